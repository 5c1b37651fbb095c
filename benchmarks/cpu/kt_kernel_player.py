"""kt-kernel's experts for a contest, in `.venv-kt-kernel`, with nothing of glm5_port (`outside.py` says what it is told).

    python kt_kernel_player.py DIRECTORY EXPERTS THREADS

`AMXInt4_KGroup_MOE`, its kernel for packed words and bfloat16 scales (method RAWINT4): activations in 8 bits by groups of 32;
without AMX it computes in AVX-512.
"""

from __future__ import annotations

import json
import sys

import kt_kernel
import torch
from safetensors.torch import load_file
from torch import Tensor

LONGEST = 2048  # tokens of a call


def block_of(directory: str, count: int, threads: int) -> tuple[object, object, Tensor]:
    """The pool of threads, a block with its experts loaded, and a tensor that must outlive it."""
    extension = kt_kernel.kt_kernel_ext
    options = extension.WorkerPoolConfig()
    options.subpool_count, options.subpool_numa_map, options.subpool_thread_count = 1, [0], [threads]
    pool = extension.CPUInfer(options)
    stored = load_file(f"{directory}/experts")
    distinct = 1 + max(int(name.partition(".")[0]) for name in stored)
    inner2, groups = stored["0.gate_up_scales"].shape
    width = stored["0.down_packed"].shape[0]
    on_device = torch.zeros(count, dtype=torch.bool)  # none; kt-kernel keeps the address
    config = extension.moe.MOEConfig(count, 8, width, inner2 // 2, on_device.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, pool.backend_, LONGEST
    halves: dict[str, list[Tensor]] = {}
    for kind, suffix in (("packed", "projs"), ("scales", "scales")):
        for n in range(distinct):
            gate, up = stored[f"{n}.gate_up_{kind}"].chunk(2)
            for name, tensor in (("gate", gate), ("up", up), ("down", stored[f"{n}.down_{kind}"])):
                halves.setdefault(f"{name}_{suffix}", []).append(tensor.contiguous())
    for name, tensors in halves.items():
        setattr(config, name, [[tensors[n % distinct].data_ptr() for n in range(count)]])
    config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, width // groups, False
    block = extension.moe.AMXInt4_KGroup_MOE(config)
    order = torch.arange(count)
    pool.submit(block.load_weights_task(order.data_ptr()))
    pool.sync()
    return pool, block, on_device


def main() -> None:
    """Answers until the end of its input."""
    directory, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pool, block, _kept = block_of(directory, count, threads)
    print("done", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "inputs" in request:
            inputs = load_file(request["inputs"])
            hidden = inputs["hidden"]
            routings = []
            while f"ids.{len(routings)}" in inputs:
                number = len(routings)
                routings.append((inputs[f"ids.{number}"].long(), inputs[f"weights.{number}"]))
            output = torch.from_file(request["output"], shared=True, size=hidden.numel(), dtype=torch.bfloat16)
            tokens = torch.tensor([len(hidden)], dtype=torch.int32)
        else:
            ids, weights = routings[request["routing"]]
            places = (tensor.data_ptr() for tensor in (ids, weights, hidden, output))
            pool.submit(block.forward_task(tokens.data_ptr(), ids.shape[1], *places, False))
            pool.sync()
        print("done", flush=True)


if __name__ == "__main__":
    main()
