"""kt-kernel as a judge of exported INT4 experts: `make test-kt-kernel`.

kt-kernel's loader reads our canonical export as it lies on the disk, and its kernels multiply by the packed words and bfloat16
scales as they are. Held against the float64 reference of `expert_mlp_int4`, as relative error of the outputs of all tokens of an
expert (each expert alone) and of mixtures of one token and of many.

It is a judge with a tolerance: `AMXInt4_KGroup_MOE` rounds activations to 8 bits in groups of 32 (without AMX it computes the
same in AVX-512), `AVX2RawInt4_MOE` keeps bfloat16. A single wrong code stays below the limit. A wrong layout does not, and the
faults show that: each must raise the error of the experts that it touches above `FAULTY`, and leave the others within the limit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.operators import expert_mlp_int4
from glm5_port.quant.export import export
from glm5_port.testing.tiny import TINY
from tests.outside.judging import TINY_CODE, NotRun, Verdict, main, play, read_all, write_random

ENVIRONMENT, PLAYER = ".venv-kt-kernel", "kt_kernel_player.py"
LIMITS = {"AMXInt4_KGroup_MOE": 0.02, "AVX2RawInt4_MOE": 0.01}
"""Kernel -> relative error allowed."""
FAULTY = 0.05
NEEDED = ("avx512f", "avx512bw")
EACH, MANY = 4, 64
"""Tokens of each expert alone, and of the larger mixture."""
TOUCHED = 3
"""The expert that faults begin at."""
WIDE = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 8, "num_hidden_layers": 3}


def check_processor() -> None:
    """Raises NotRun where kt-kernel's AMX kernels, and their AVX-512 forms, cannot run."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration) as error:
        raise NotRun("kt-kernel has wheels for Linux on x86-64 only") from error
    if missing := [flag for flag in NEEDED if flag not in flags]:
        raise NotRun(f"this processor has no {', '.join(missing)}; AMXInt4_KGroup_MOE needs AVX-512 or AMX")


class Layer:
    """The routed experts of a layer of a canonical checkpoint."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number
        self.config = Glm5Config.from_json(directory)
        self._stored = read_all(directory)

    def name(self, expert: int, projection: str, part: str) -> str:
        """Of one tensor."""
        return f"model.layers.{self.number}.mlp.experts.{expert}.{projection}_proj.weight_{part}"

    def reference(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`expert_mlp_int4` in float64: [T, D]."""

        def stack(part: str, *projections: str) -> Tensor:
            experts = range(self.config.n_routed_experts)
            return torch.stack([torch.cat([self._stored[self.name(e, p, part)] for p in projections]) for e in experts])

        tensors = (stack("packed", "gate", "up"), stack("scale", "gate", "up"), stack("packed", "down"), stack("scale", "down"))
        group = self.config.hidden_size // tensors[1].shape[-1]
        return expert_mlp_int4.reference(hidden.double(), weights.double(), ids.int(), *tensors, group_size=group)

    def alone(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, ids and weights of some tokens for each expert."""
        ids = torch.arange(self.config.n_routed_experts).repeat_interleave(EACH).unsqueeze(1)
        return self._hidden(len(ids)), ids, torch.ones(ids.shape)

    def mixture(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, ids and weights as a router gives them."""
        generator = torch.Generator().manual_seed(tokens)
        scores = torch.rand((tokens, self.config.n_routed_experts), generator=generator)
        values, ids = scores.topk(self.config.num_experts_per_tok)
        return self._hidden(tokens), ids, values / values.sum(-1, keepdim=True) * self.config.routed_scaling_factor

    def _hidden(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + tokens)
        return torch.randn((tokens, self.config.hidden_size), generator=generator).to(torch.bfloat16)


# -- faults: each edits the tensors of a copy, and says which experts it touches -------------------------------------------


def exchange_gate_and_up(layer: Layer, tensors: dict[str, Tensor]) -> set[int]:
    """Of one expert."""
    for part in ("packed", "scale"):
        gate, up = layer.name(TOUCHED, "gate", part), layer.name(TOUCHED, "up", part)
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    return {TOUCHED}


def shift_scales(layer: Layer, tensors: dict[str, Tensor]) -> set[int]:
    """Every later expert takes the next one's, as when one is missing."""
    later = range(TOUCHED, layer.config.n_routed_experts - 1)
    for projection in ("gate", "up", "down"):
        for expert in later:
            tensors[layer.name(expert, projection, "scale")] = tensors[layer.name(expert + 1, projection, "scale")]
    return set(later)


def exchange_nibbles(layer: Layer, tensors: dict[str, Tensor]) -> set[int]:
    """The two codes of every byte of one projection of one expert."""
    name = layer.name(TOUCHED, "down", "packed")
    data = tensors[name].view(torch.uint8)
    tensors[name] = ((data >> 4) | (data << 4)).view(torch.int32)
    return {TOUCHED}


FAULTS: dict[str, Callable[[Layer, dict[str, Tensor]], set[int]]] = {
    "gate and up exchanged in one expert": exchange_gate_and_up,
    "scales of later experts shifted by one": shift_scales,
    "nibbles exchanged in one expert": exchange_nibbles,
}


def damage(layer: Layer, directory: Path, fault: str) -> set[int]:
    """Writes a copy of the checkpoint with a fault in it; the experts that it touches."""
    shutil.copytree(layer.directory, directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    touched = FAULTS[fault](layer, tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    return touched


# -- judging -------------------------------------------------------------------------------------------------------------


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error over everything given."""
    return float((theirs.double() - ours).norm() / ours.norm())


def judge(verdict: Verdict, directory: Path) -> None:
    """Asks kt-kernel about both checkpoints and their faults at once, then compares."""
    check_processor()
    export(TINY_CODE, directory / "glm5-tiny-code")
    export(write_random(directory / "wide bf16", {**TINY, **WIDE}), directory / "random, wide")
    layers = [Layer(directory / "glm5-tiny-code", 2), Layer(directory / "random, wide", 2)]
    inputs: dict[str, Tensor] = {}
    runs: list[dict[str, object]] = []
    touched: dict[str, set[int]] = {}

    def ask(name: str, layer: Layer, place: Path, kernel: str, given: tuple[Tensor, Tensor, Tensor]) -> None:
        inputs.update({f"{name}/{part}": t.contiguous() for part, t in zip(("hidden", "ids", "weights"), given, strict=True)})
        experts = layer.config.n_routed_experts
        runs.append({"name": name, "directory": str(place), "layer": layer.number, "experts": experts, "kernel": kernel})

    for layer in layers:
        title = layer.directory.name
        for fault in FAULTS:
            touched[f"{title}/{fault}"] = damage(layer, directory / f"{title}, {fault}", fault)
        for kernel in LIMITS:
            ask(f"{title}/{kernel}/alone", layer, layer.directory, kernel, layer.alone())
            for tokens in (1, MANY):
                ask(f"{title}/{kernel}/{tokens}", layer, layer.directory, kernel, layer.mixture(tokens))
            for fault in FAULTS:
                ask(f"{title}/{kernel}/{fault}", layer, directory / f"{title}, {fault}", kernel, layer.alone())
    save_file(inputs, directory / "inputs.safetensors")
    (directory / "requests.json").write_text(json.dumps({"inputs": str(directory / "inputs.safetensors"), "runs": runs}))
    said = play(ENVIRONMENT, PLAYER, str(directory / "requests.json"), str(directory / "answers.safetensors"))
    verdict.note(f"kt-kernel's variant for this processor: {said.rpartition('variant=')[2].split()[0]}")
    answers = load_file(directory / "answers.safetensors")
    for layer in layers:
        title, config = layer.directory.name, layer.config
        verdict.note(
            f"{title}: layer {layer.number}, {config.n_routed_experts} experts, {config.hidden_size} x "
            f"{config.moe_intermediate_size}, {config.num_experts_per_tok} for each token"
        )
        for kernel, limit in LIMITS.items():
            whole = f"{title}/{kernel}"
            errors = each_alone(layer, answers[f"{whole}/alone"])
            verdict.check(
                max(errors) <= limit, f"{kernel}: experts alone {min(errors):.2%} to {max(errors):.2%}; limit {limit:.0%}"
            )
            for tokens in (1, MANY):
                found = error(layer.reference(*layer.mixture(tokens)), answers[f"{whole}/{tokens}"])
                verdict.check(found <= limit, f"{kernel}: mixture of experts, tokens: {tokens:2}: {found:.2%}; limit {limit:.0%}")
            for fault in FAULTS:
                errors = each_alone(layer, answers[f"{whole}/{fault}"])
                hit = touched[f"{title}/{fault}"]
                worst = min(errors[expert] for expert in hit)
                spared = all(e <= limit for expert, e in enumerate(errors) if expert not in hit)
                text = f"{kernel}: fault: {fault}: {worst:.0%} or more where it is; at least {FAULTY:.0%} asked for"
                verdict.check(worst > FAULTY and spared, text)


def each_alone(layer: Layer, theirs: Tensor) -> list[float]:
    """The error of every expert."""
    ours = layer.reference(*layer.alone())
    return [error(o, t) for o, t in zip(ours.split(EACH), theirs.split(EACH), strict=True)]


if __name__ == "__main__":
    sys.exit(main("kt-kernel", judge))
