"""One rank of a model that two stand-in devices share: `python -m tests.npu_runtime.ranks RANK WORLD FOLDER`.

Each layout's logits are compared with those of a model alone on the same stand-in device; what is found is written as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(rank: int, world: int, folder: Path) -> None:
    """See the module."""
    from tests.npu_runtime import collectives, machine

    machine.start()
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from glm5_port.model.build import build, random_weights
    from glm5_port.model.ranks import Ranks
    from glm5_port.model.tensors import expected_tensors
    from glm5_port.parallel.execute import PlanRanks
    from glm5_port.parallel.plan import Layout
    from glm5_port.testing.tiny import tiny_config
    from tests.npu_runtime.contracts import BLOCK, CONTRACTS, TOKENS

    collectives.register()
    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    config, device = tiny_config(**CONTRACTS), torch.device("npu", 0)
    whole, expected = random_weights(config, dtype=torch.bfloat16), expected_tensors(config, mtp=False)

    def model(ranks: Ranks) -> object:
        def read(name: str) -> Tensor:
            cut = ranks.cut(name, expected[name].component, expected[name].shape)
            return (whole(name) if cut is None else whole(name).narrow(*cut)).clone().to(device)

        return build(config, read, backend="npu", dtype=torch.bfloat16, block_size=BLOCK, ranks=ranks)

    texts = torch.cat((TOKENS, TOKENS.flip(1)))
    alone = model(Ranks())(texts).float()
    found = {}
    for name, layout in {
        "DP2 EP2 flat": Layout(data=world, expert=world, exchange="all_to_all"),
        "DP2 EP2 gather": Layout(data=world, expert=world, exchange="all_gather"),
        "TP2 EP2": Layout(tensor=world, expert=world),
    }.items():
        shared = model(PlanRanks(layout, config, node_devices=world, device=device))
        with machine.recorded() as calls:
            logits = shared(texts).float()
        found[name] = {
            "error": float((logits - alone).square().mean().sqrt() / alone.square().mean().sqrt()),
            "equal": float((logits.argmax(-1) == alone.argmax(-1)).float().mean()),
            "kernels": sorted({call.kernel for call in calls}),
            "refused": sorted({call.kernel for call in calls if not call.ran}),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps({"backend": dist.get_backend(), "layouts": found}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
