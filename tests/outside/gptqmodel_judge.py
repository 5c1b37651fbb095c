"""GPT-QModel as a judge of exports to GPTQ and AWQ: `make test-gptqmodel`.

It loads each export as a user would, with its PyTorch kernels on the CPU, experts one by one. For each format:

modules     What it takes for quantised is what is quantised, no more and no less.
weights     Every weight of these modules, in float16: code x scale, rounded once, bit for bit.
logits      Over a text, in float16, against this library's model of the same codes in float32: the median difference stays
            below `MEDIAN` of the spread, and greedy tokens are equal wherever the margin exceeds `MARGIN` of the spread.
faults      It notices nothing of either, so the judge must: an AWQ block without `dynamic` (GPT-QModel does not read
            `modules_to_not_convert`, and takes random weights for what it does not find), and one code that is another.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm5_port.quant.export import export
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from tests.outside.judging import ROOT, TINY_CODE, Verdict, decoded_model, main, play, read_all

ENVIRONMENT, PLAYER = ".venv-gptqmodel", "gptqmodel_player.py"
KERNELS = {"gptq": "GPTQ_TORCH", "awq": "AWQ_TORCH"}
MEDIAN, MARGIN = 0.01, 0.1
"""Limits, of the standard deviation of the logits."""
MORE = (r"self_attn\.(q_b|o)_proj",)
"""Quantised besides the experts, so that not everything in attention is left out."""
BROKEN = "model.layers.2.mlp.experts.3.up_proj"


def without_dynamic(directory: Path) -> None:
    """Takes `dynamic` out of both files that name it."""
    for name in ("config.json", "quant_config.json"):
        fields = json.loads((directory / name).read_text())
        fields.get("quantization_config", fields).pop("dynamic")
        (directory / name).write_text(json.dumps(fields))


def with_another_code(directory: Path) -> None:
    """Changes the lowest bit of one word of one expert."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := f"{BROKEN}.qweight") in tensors:
            tensors[name][5, 3] ^= 1
            save_file(tensors, file, metadata={"format": "pt"})


def expected(canonical: Path) -> dict[str, Tensor]:
    """Module -> weight in float16, of every quantised weight but those of the MTP layer, which this loader leaves out."""
    stored, found = read_all(canonical), {}
    layers = decoded_model(canonical).config.num_hidden_layers
    for name in (name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        if int(name.split(".")[2]) < layers:
            codes, scales = unpack_int4(stored[f"{name}.weight_packed"]), stored[f"{name}.weight_scale"].float()
            found[name] = (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2).half()
    return found


def judge(verdict: Verdict, directory: Path) -> None:
    """Asks about every checkpoint at once, then compares."""
    tokens = list((ROOT / "LICENSE").read_bytes()[:200])
    canonical = directory / "canonical"
    export(TINY_CODE, canonical, Options(include=MORE))
    places: dict[str, tuple[Path, str]] = {}
    for form, kernel in KERNELS.items():
        places[form] = (directory / form, kernel)
        export(TINY_CODE, directory / form, Options(format=form, include=MORE))
        places[f"{form}, another code"] = (directory / f"{form} code", kernel)
        shutil.copytree(directory / form, directory / f"{form} code")
        with_another_code(directory / f"{form} code")
    places["awq, no dynamic"] = (directory / "awq dynamic", KERNELS["awq"])
    shutil.copytree(directory / "awq", directory / "awq dynamic")
    without_dynamic(directory / "awq dynamic")
    requests = [
        {"name": name, "directory": str(place), "kernel": kernel, "tokens": tokens} for name, (place, kernel) in places.items()
    ]
    (directory / "requests.json").write_text(json.dumps(requests))
    play(ENVIRONMENT, PLAYER, str(directory / "requests.json"), str(directory / "answers.safetensors"))
    answers = load_file(directory / "answers.safetensors")
    weights = expected(canonical)
    with torch.no_grad():
        ours = decoded_model(canonical)(torch.tensor([tokens]))[0]
    for form in KERNELS:
        modules, wrong = compare_weights(answers, form, weights)
        verdict.check(modules == set(weights), f"{form}: modules: {len(modules)} quantised, {len(weights)} written")
        verdict.check(not wrong, f"{form}: weights: {len(weights) - len(wrong)} of {len(weights)} equal bit for bit")
        compare_logits(verdict, form, ours, answers[f"{form}/logits"])
        _, wrong = compare_weights(answers, f"{form}, another code", weights)
        verdict.check(wrong == {BROKEN}, f"{form}: fault: another code: {len(wrong)} weights differ; 1 asked for")
    modules, _ = compare_weights(answers, "awq, no dynamic", weights)
    verdict.check(
        modules > set(weights), f"awq: fault: no dynamic: {len(modules - set(weights))} modules too many; some asked for"
    )


def compare_weights(answers: dict[str, Tensor], name: str, weights: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    """The modules that are quantised there, and those of ours whose weights differ."""
    prefix = f"{name}/weight/"
    theirs = {key.removeprefix(prefix): tensor for key, tensor in answers.items() if key.startswith(prefix)}
    return set(theirs), {
        module for module, weight in weights.items() if module not in theirs or not torch.equal(theirs[module], weight)
    }


def compare_logits(verdict: Verdict, name: str, ours: Tensor, theirs: Tensor) -> None:
    """Logits position by position, greedy tokens wherever the margin is wide enough."""
    spread, top = float(ours.std()), ours.topk(2, dim=-1).values
    difference = (ours - theirs).abs() / spread
    clear = top[:, 0] - top[:, 1] > MARGIN * spread
    same = ours.argmax(-1) == theirs.argmax(-1)
    middle, most = float(difference.median()), float(difference.max())
    verdict.check(
        middle <= MEDIAN and bool(same[clear].all()) and bool(clear.any()),
        f"{name}: logits: {middle:.2%} of the spread in the middle, {most:.2%} at most; limit {MEDIAN:.0%} in the middle; greedy "
        f"tokens equal at {int((same & clear).sum())} of {int(clear.sum())} with a clear margin",
    )


if __name__ == "__main__":
    sys.exit(main("GPT-QModel", judge))
