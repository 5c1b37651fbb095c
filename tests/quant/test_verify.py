"""Verification catches what loaders let pass: each fault is injected into a good export, and must be named. With the manifest and
with the source alone: a tool that damages a checkpoint may as well have written the manifest anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, ConfigError
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options
from glm5_port.quant.verify import verify
from tests.quant.exports import SMALL_SHARDS, change, expert, read_all, write_source

CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "int4_manifest.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("verify") / "source")


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    export(source, source.parent / "int4", SMALL_SHARDS)
    return source.parent / "int4"


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def edit_config(directory: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads((directory / CONFIG).read_text())
    edit(content)
    (directory / CONFIG).write_text(json.dumps(content, indent=2))


# --- the faults ------------------------------------------------------------------------------------------------------------


def flip_a_nibble(directory: Path) -> None:
    name = expert(2, 1, "up") + "_packed"

    def edit(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name][5, 3] ^= 1 << 12

    change(directory, edit)


def swap_gate_and_up(directory: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for part in ("_packed", "_scale"):
            gate, up = expert(2, 1, "gate") + part, expert(2, 1, "up") + part
            if gate in tensors:
                tensors[gate], tensors[up] = tensors[up], tensors[gate]

    change(directory, edit)


def drop_a_scale(directory: Path) -> None:
    name = expert(3, 2, "down") + "_scale"
    change(directory, lambda tensors: tensors.pop(name, None))
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][name]
    (directory / INDEX).write_text(json.dumps(index))


def shift_later_scales(directory: Path) -> None:
    """As transformers does when one scale is missing: every later expert takes the next one's."""
    whole = read_all(directory)

    def edit(tensors: dict[str, Tensor]) -> None:
        for number in range(1, 3):
            name = expert(2, number, "gate") + "_scale"
            if name in tensors:
                tensors[name] = whole[expert(2, number + 1, "gate") + "_scale"].clone()

    change(directory, edit)


def wrong_group_size(directory: Path) -> None:
    edit_config(directory, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64))


def drop_the_mtp_layer(directory: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.4.")]:
            del tensors[name]

    change(directory, edit)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith("model.layers.4.")}
    (directory / INDEX).write_text(json.dumps(index))


def truncate_a_shard(directory: Path) -> None:
    file = sorted(directory.glob("model-*.safetensors"))[1]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1000)


def another_config(directory: Path) -> None:
    edit_config(directory, lambda c: c.update(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}))


FAULTS = [
    (flip_a_nibble, expert(2, 1, "up") + "_packed"),
    (swap_gate_and_up, expert(2, 1, "gate") + "_packed"),
    (drop_a_scale, expert(3, 2, "down") + "_scale"),
    (shift_later_scales, expert(2, 2, "gate") + "_scale"),
    (wrong_group_size, "group_size"),
    (drop_the_mtp_layer, "MTP layer"),
    (truncate_a_shard, "truncated"),
    (another_config, "config.json"),
]


@pytest.mark.parametrize(("fault", "named"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
@pytest.mark.parametrize("by", ["manifest", "source", "both"])
def test_every_fault_is_caught_and_named(fault: Callable[[Path], None], named: str, by: str, copy: Path, source: Path) -> None:
    fault(copy)
    if by == "source":
        (copy / MANIFEST).unlink()
    problems = verify(copy, None if by == "manifest" else source).problems
    assert any(named in problem for problem in problems), problems


def test_a_good_export_has_no_problem_by_any_way(good: Path, source: Path, copy: Path) -> None:
    for found in (verify(good), verify(good, source), verify(good, source, sample=5), verify(good, source, workers=4)):
        assert found.problems == []
    (copy / MANIFEST).unlink()
    assert verify(copy, source).problems == []
    alone = verify(copy)
    assert alone.problems == []
    assert any("no sha256" in note for note in alone.notes)


@pytest.mark.parametrize(
    "options",
    [
        Options(include=("shared_experts",)),
        Options(exclude=(r"layers\.2\.",)),
        Options(mtp="bf16", include=(r"layers\.2\.mlp\.shared_experts\.(gate|up)_proj",), exclude=(r"experts\.3\.",)),
    ],
    ids=["include", "exclude", "both, and an MTP layer in bf16"],
)
def test_what_an_export_chose_is_known_without_its_manifest(source: Path, tmp_path: Path, options: Options) -> None:
    export(source, tmp_path / "int4", options)
    (tmp_path / "int4" / MANIFEST).unlink()
    assert verify(tmp_path / "int4", source).problems == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (drop_a_scale, "_scale is missing"),
        (wrong_group_size, "weights.group_size = 64; the tensors have 32"),
        (drop_the_mtp_layer, "MTP layer is missing"),
        (truncate_a_shard, "truncated"),
    ],
)
def test_what_shows_without_manifest_and_source(fault: Callable[[Path], None], named: str, copy: Path) -> None:
    (copy / MANIFEST).unlink()
    fault(copy)
    assert any(named in problem for problem in verify(copy).problems)


def test_swapped_tensors_are_recognised(copy: Path) -> None:
    swap_gate_and_up(copy)
    gate, up = expert(2, 1, "gate"), expert(2, 1, "up")
    wanted = f"{gate}_packed does not have the digest of the manifest: it holds the bytes of {up}_packed"
    assert wanted in verify(copy).problems


def _edit_tensor(directory: Path, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    def change_it(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = edit(tensors[name])

    change(directory, change_it)
    (directory / MANIFEST).unlink()


def _set(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor[row, column] = value
        return tensor

    return edit


NAME = expert(1, 3, "down")


@pytest.mark.parametrize(
    ("part", "edit", "named"),
    [
        ("_packed", lambda t: t & ~0xF, "codes below -7"),  # nibble 0 of every word becomes code -8
        ("_packed", lambda t: torch.full_like(t, -0x77777778), "groups without a code of magnitude 7"),  # 0x88888888: all zeros
        ("_scale", _set(3, 1, float("nan")), "NaN or infinite"),
        ("_scale", _set(3, 1, float("inf")), "NaN or infinite"),
        ("_scale", _set(3, 1, 0.0), "not positive"),
        ("_scale", _set(3, 1, -1.0), "not positive"),
        ("_scale", lambda t: t.float(), "is stored as F32; expected BF16"),
        ("_scale", lambda t: t.T.contiguous(), "in groups of 32 has"),
        ("_shape", lambda t: t.flip(0), "expected [64, 96]"),
    ],
)
def test_values_that_the_rule_never_gives(copy: Path, part: str, edit: Callable[[Tensor], Tensor], named: str) -> None:
    _edit_tensor(copy, NAME + part, edit)
    problems = verify(copy).problems
    assert any(named in problem for problem in problems), problems
    assert all(problem.startswith(NAME) for problem in problems)


def test_int64_shapes_of_other_tools_are_as_good(copy: Path) -> None:
    _edit_tensor(copy, NAME + "_shape", lambda t: t.to(torch.int64))
    assert verify(copy).problems == []


def _move_format(config: dict) -> None:
    del config["quantization_config"]["format"]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["quantization_config"].update(ignore=["lm_head"]), "does not name modules that are not quantised"),
        (lambda c: c["quantization_config"]["ignore"].append("re:.*experts.*"), "names modules that are quantised"),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:.*experts.*"]), "targets"),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False), "symmetric"),
        (lambda c: c.pop("quantization_config"), "no quantization_config"),
        (_move_format, "format = None"),
    ],
)
def test_a_config_that_says_something_else(copy: Path, edit: Callable[[dict], None], named: str) -> None:
    edit_config(copy, edit)
    (copy / MANIFEST).unlink()
    assert any(named in problem for problem in verify(copy).problems)


def test_a_carried_tensor_that_changed_and_a_tensor_too_many(copy: Path, source: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["stranger"] = torch.ones(1)
        tensors["model.norm.weight"][0] += 1

    file = json.loads((copy / INDEX).read_text())["weight_map"]["model.norm.weight"]
    change(copy, edit, file)
    problems = verify(copy, source).problems
    assert "model.norm.weight does not have the digest of the manifest" in problems
    assert "model.norm.weight is not what the source gives" in problems
    assert any(problem.startswith("stranger") for problem in problems)
    assert any("does not list 1 tensors" in problem for problem in problems)


def test_a_missing_copied_file(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert verify(copy).problems == ["tokenizer.json is missing"]


def test_sampling_compares_so_many_and_still_reads_everything_else(good: Path, source: Path) -> None:
    found = verify(good, source, sample=7)
    assert any(line.startswith("7 of 138 tensors") for line in found.checked)


def test_another_source_is_told_apart(good: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", rms_norm_eps=1e-6)
    change(other, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    problems = verify(good, other).problems
    assert "config.json differs from that of the source in more than quantization_config" in problems
    assert len([problem for problem in problems if "is not what the source gives" in problem]) > 100


def test_what_is_no_int4_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no INT4 weights"):
        verify(source)  # bf16
    with pytest.raises(CheckpointError, match="not a directory"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot read"):
        verify(tmp_path)


def test_a_broken_manifest_is_one_clear_error(copy: Path) -> None:
    for text in ("", "{}", '{"schema": 99, "tensors": {}, "files": {}}'):
        (copy / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify(copy)
