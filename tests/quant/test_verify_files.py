"""Verification of GGUF and ONNX exports catches what it catches in safetensors: each fault is injected into a good export, and
must be named. With the manifest and with the source alone: a tool that damages files may have written the manifest anew."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import torch

from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant import writing
from glm5_port.quant.export import export
from glm5_port.quant.files import Reader, SpreadTensor
from glm5_port.quant.formats import find_format
from glm5_port.quant.gguf_file import KINDS, read_header, stored_value
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.output_files import Place
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.transcode import transcode
from glm5_port.quant.verify import verify
from glm5_port.quant.writing import spread
from tests.quant.exports import digests, expert, write_source

CONFIG, MANIFEST = "config.json", "int4_manifest.json"
FORMATS = ("gguf", "onnx")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("verify_files") / "source")


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    """Exports by format, and one with a scale for each row beside them."""
    for name in FORMATS:
        export(source, source.parent / name, Options(format=name))
    export(source, source.parent / "gguf-rows", Options(format="gguf", rule=Int4Rule("amax7", -1)))
    return source.parent


@pytest.fixture(params=FORMATS)
def copy(good: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(good / request.param, tmp_path / request.param))


# --- pieces ----------------------------------------------------------------------------------------------------------------


def piece(directory: Path, name: str, part: str = "codes") -> str:
    """What the codes or the scales of a weight lie in."""
    if directory.name.startswith("onnx"):
        return f"{name}.{part}"
    _, _, layer, _, _, number, projection, _ = name.split(".")
    return f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight[{number}]"


def get(directory: Path, name: str) -> bytearray:
    stored = find_format(directory.name).container.read(directory).tensors[name]
    with Reader(directory) as reader:
        return reader.bytes(stored, 0, stored.bytes)


def put(directory: Path, name: str, data: bytes) -> None:
    stored = find_format(directory.name).container.read(directory).tensors[name]
    place = Place(stored.start, stored.row, stored.stride) if isinstance(stored, SpreadTensor) else Place(stored.start)
    with (directory / stored.file).open("r+b") as stream:
        for some, first in spread(place, 0, memoryview(data)):
            stream.seek(first)
            stream.write(some)


def blocks(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, 18)


# --- the faults ------------------------------------------------------------------------------------------------------------


def flip_a_nibble(directory: Path) -> None:
    name = piece(directory, expert(2, 1, "up"))
    data = get(directory, name)
    data[18 * 7 + 5] ^= 0x30
    put(directory, name, data)


def swap_gate_and_up(directory: Path) -> None:
    for part in ("codes", "scales") if directory.name == "onnx" else ("codes",):
        gate, up = (piece(directory, expert(2, 1, projection), part) for projection in ("gate", "up"))
        first, second = get(directory, gate), get(directory, up)
        put(directory, gate, second)
        put(directory, up, first)


def lose_a_scale(directory: Path) -> None:
    """A stack of scales that no graph names; in GGUF, where a scale lies in its block, one that is nothing."""
    if directory.name == "gguf":
        name = piece(directory, expert(3, 2, "down"))
        data = get(directory, name)
        data[18 * 4 : 18 * 4 + 2] = b"\0\0"
        put(directory, name, data)
        return
    model = onnx.load(directory / "decoder.onnx", load_external_data=False)
    kept = [i for i in model.graph.initializer if i.name != "model.layers.3.mlp.experts.down.scales"]
    assert len(kept) == len(model.graph.initializer) - 1
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    (directory / "decoder.onnx").write_bytes(model.SerializeToString())


def shift_later_scales(directory: Path) -> None:
    for number in range(1, 3):
        ours, theirs = (piece(directory, expert(2, n, "gate"), "scales") for n in (number, number + 1))
        data, next_ones = get(directory, ours), get(directory, theirs)
        if directory.name == "gguf":
            blocks(data)[:, :2] = blocks(next_ones)[:, :2].clone()
        put(directory, ours, data if directory.name == "gguf" else next_ones)


def wrong_group_size(directory: Path) -> None:
    """A graph that takes groups of 16 where the scales are of 32; in GGUF, scales of whole rows where the record says 32."""
    if directory.name == "gguf":
        shutil.copy(directory.parent / "good" / "gguf-rows" / "model.gguf", directory)
        return
    model = onnx.load(directory / "decoder.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "QMoE")
    next(attribute for attribute in node.attribute if attribute.name == "block_size").i = 16
    (directory / "decoder.onnx").write_bytes(model.SerializeToString())


def drop_the_mtp_layer(directory: Path) -> None:
    if directory.name == "onnx":
        for file in ("mtp.onnx", "layer_4.onnx", "layer_4.data"):
            (directory / file).unlink()
        return
    rewrite(directory / "model.gguf", lambda name: not name.startswith("blk.4."))


def truncate_a_file(directory: Path) -> None:
    file = directory / ("model.gguf" if directory.name == "gguf" else "layer_2.data")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 5000)


def another_config(directory: Path) -> None:
    content = json.loads((directory / CONFIG).read_text())
    content["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    (directory / CONFIG).write_text(json.dumps(content, indent=2))


def rewrite(path: Path, keep: Callable[[str], bool], metadata: dict[str, bytes] | None = None) -> None:
    """A GGUF file again with some of its tensors, by the book and not by the package's own writer."""
    found, data = read_header(path), path.read_bytes()
    tensors = {tensor: first for tensor, first in found.tensors.items() if keep(tensor.name)}
    entries = found.metadata if metadata is None else metadata
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    for key, value in entries.items():
        head += struct.pack("<Q", len(key)) + key.encode() + value
    body = b""
    for tensor, first in tensors.items():
        head += struct.pack("<Q", len(tensor.name)) + tensor.name.encode() + struct.pack("<I", len(tensor.shape))
        head += b"".join(struct.pack("<Q", edge) for edge in tensor.shape[::-1])
        head += struct.pack("<IQ", KINDS[tensor.kind][0], len(body))
        body += data[first : first + tensor.bytes] + bytes(-tensor.bytes % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


FAULTS: Sequence[tuple[Callable[[Path], None], str, str]] = [
    (flip_a_nibble, "blk.2.ffn_up_exps.weight[1]", expert(2, 1, "up") + ".codes"),
    (swap_gate_and_up, "blk.2.ffn_gate_exps.weight[1]", expert(2, 1, "gate") + ".codes"),
    (lose_a_scale, "blk.3.ffn_down_exps.weight[2]", expert(3, 2, "down") + ".scales"),
    (shift_later_scales, "blk.2.ffn_gate_exps.weight[2]", expert(2, 2, "gate") + ".scales"),
    (wrong_group_size, "groups without a code of magnitude 7", "decoder.onnx is not the graph that config.json"),
    (drop_the_mtp_layer, "MTP layer", "MTP layer"),
    (truncate_a_file, "truncated", "truncated"),
    (another_config, "glm-dsa.rope.freq_base is 8000000", "decoder.onnx is not the graph that config.json"),
]


@pytest.mark.parametrize(("fault", "in_gguf", "in_onnx"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
@pytest.mark.parametrize("by", ["manifest", "source", "both"])
def test_every_fault_is_caught_and_named(
    fault: Callable[[Path], None], in_gguf: str, in_onnx: str, by: str, copy: Path, good: Path, source: Path
) -> None:
    (copy.parent / "good").symlink_to(good)
    fault(copy)
    if by == "source":
        (copy / MANIFEST).unlink()
    problems = verify(copy, None if by == "manifest" else source).problems
    named = in_gguf if copy.name == "gguf" else in_onnx
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize("fault", [drop_the_mtp_layer, truncate_a_file, another_config, wrong_group_size, lose_a_scale])
def test_what_shows_without_manifest_and_source(fault: Callable[[Path], None], copy: Path, good: Path) -> None:
    (copy.parent / "good").symlink_to(good)
    (copy / MANIFEST).unlink()
    fault(copy)
    assert verify(copy).problems


@pytest.mark.parametrize("name", FORMATS)
def test_rows_in_many_blocks_are_the_same_rows(
    good: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(writing, "BLOCK_WEIGHTS", 64 * 7)
    export(source, tmp_path / "canonical", Options(max_shard_bytes=100_000))
    export(source, tmp_path / "direct", Options(name))
    transcode(tmp_path / "canonical", tmp_path / "moved", Options(name))
    whole = digests(good / name)
    weights = [file for file in whole if file.endswith((".gguf", ".data", ".onnx"))]
    for directory in ("direct", "moved"):
        found = digests(tmp_path / directory)
        assert [found[file] for file in weights] == [whole[file] for file in weights]


def test_a_good_export_has_no_problem_by_any_way(copy: Path, source: Path) -> None:
    for found in (verify(copy), verify(copy, source), verify(copy, source, sample=5), verify(copy, source, workers=4)):
        assert found.problems == []
        assert not any("not known here" in note for note in found.notes)
    (copy / MANIFEST).unlink()
    assert verify(copy, source).problems == []
    alone = verify(copy)
    assert alone.problems == []
    assert any("no sha256" in note for note in alone.notes)


def test_a_weight_that_graphs_decode_themselves(tmp_path: Path) -> None:
    """kv_b_proj in INT4: graphs name its codes as UINT4, and both the trunk and the MTP layer have one."""
    source, options = write_source(tmp_path / "source", kv_lora_rank=32), Options("onnx", include=("kv_b_proj",))
    export(source, tmp_path / "onnx", options)
    export(source, tmp_path / "canonical", Options(include=options.include))
    moved, canonical = tmp_path / "moved", tmp_path / "canonical"
    transcode(canonical, moved, options)
    for found in (verify(tmp_path / "onnx", source), verify(moved, canonical), verify(moved)):
        assert found.problems == []
        assert not any("not known here" in note for note in found.notes)
    for layer in (2, 4):
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight.codes"
        data = get(tmp_path / "onnx", name)
        data[9] ^= 0x30
        put(tmp_path / "onnx", name, data)
        assert any(name in problem for problem in verify(tmp_path / "onnx").problems)
        assert f"{name} is not what the source gives" in verify(tmp_path / "onnx", source).problems


def test_swapped_weights_are_recognised(copy: Path) -> None:
    swap_gate_and_up(copy)
    gate, up = (piece(copy, expert(2, 1, projection)) for projection in ("gate", "up"))
    assert f"{gate} does not have the digest of the manifest: it holds the bytes of {up}" in verify(copy).problems


def test_a_group_size_in_the_record_that_is_not_that_of_the_scales(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["rule"]["group_size"] = -1
    (copy / MANIFEST).write_text(json.dumps(manifest))
    named = {"gguf": f"{expert(1, 0, 'up')}: scales differ within groups of 64", "onnx": "in groups of -1 has [96, 1]"}
    problems = verify(copy).problems
    assert any(named[copy.name] in problem for problem in problems), problems[:3]


def test_groups_that_the_source_cannot_have_are_a_problem_and_no_crash(good: Path, source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "onnx", Options(format="onnx", rule=Int4Rule("amax7", -1)))
    assert verify(tmp_path / "onnx", source).problems == []
    (tmp_path / "onnx" / MANIFEST).unlink()  # rows of 96 then look like groups of 32, and rows of 64 like groups of 64
    problems = verify(tmp_path / "onnx", source).problems
    assert any("no export of the source gives this checkpoint: " in problem for problem in problems), problems


def test_another_source_is_told_apart(copy: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", routed_scaling_factor=1.5)
    problems = verify(copy, other).problems
    assert "config.json differs from that of the source in more than quantization_config" in problems


# --- each format's own -----------------------------------------------------------------------------------------------------


def gguf_copy(good: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(good / "gguf", tmp_path / "gguf"))
    (copy / MANIFEST).unlink()
    return copy


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "glm-dsa.expert_weights_norm",
            False,
            "glm-dsa.expert_weights_norm is False; config.json and the tokenizer make it True",
        ),
        ("glm-dsa.attention.indexer.top_k", 5, "glm-dsa.attention.indexer.top_k is 5; config.json and the tokenizer make it 4"),
        ("tokenizer.ggml.model", "gpt2", "tokenizer.ggml.model is 'gpt2'"),
        ("general.architecture", "deepseek2", "general.architecture is 'deepseek2'"),
        ("stranger", [1, 2], "stranger is 2 values; config.json and the tokenizer make it missing"),
    ],
)
def test_metadata_that_is_not_that_of_the_model(good: Path, tmp_path: Path, key: str, value: object, named: str) -> None:
    copy = gguf_copy(good, tmp_path)
    metadata = read_header(copy / "model.gguf").metadata | {key: stored_value(value)}  # type: ignore[arg-type]
    rewrite(copy / "model.gguf", lambda _: True, metadata)
    assert [problem for problem in verify(copy).problems if named in problem], verify(copy).problems


def test_a_file_that_is_written_anew_by_the_book_is_good(good: Path, tmp_path: Path) -> None:
    copy = gguf_copy(good, tmp_path)
    rewrite(copy / "model.gguf", lambda _: True)
    assert verify(copy).problems == []


def test_parts_that_do_not_belong_together(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "gguf"
    export(source, parts, Options(format="gguf", max_shard_bytes=100_000))
    (parts / MANIFEST).unlink()
    second, third = parts / "model-00002-of-00006.gguf", parts / "model-00003-of-00006.gguf"
    data = second.read_bytes()
    shutil.copy(third, second)
    assert any("model-00002-of-00006.gguf: split.no is 2; expected 1" in problem for problem in verify(parts).problems)
    second.unlink()
    problems = verify(parts).problems
    assert "files: model-00002-of-00006.gguf: missing" in problems
    second.write_bytes(data)
    assert verify(parts).problems == []
    shutil.copy(second, parts / "model-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match="parts of several models"):
        verify(parts)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 2, 1, 1), "GGUF version 2"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "truncated inside its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**60), "damaged header"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"x", 1, 32, 12, 0), "x is of type 12"),
    ],
)
def test_what_is_no_gguf_file_is_one_clear_fault(good: Path, tmp_path: Path, data: bytes, text: str) -> None:
    copy = gguf_copy(good, tmp_path)
    (copy / "model.gguf").write_bytes(data)
    assert any(problem.startswith("files: model.gguf: ") and text in problem for problem in verify(copy).problems)


def test_graphs_that_are_not_the_ones_of_the_model(good: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good / "onnx", tmp_path / "onnx"))
    (copy / MANIFEST).unlink()
    model = onnx.load(copy / "layer_2.onnx", load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "QMoE")
    (block,) = (attribute for attribute in node.attribute if attribute.name == "block_size")
    block.i = 16
    (copy / "layer_2.onnx").write_bytes(model.SerializeToString())
    (copy / "layer_3.onnx").unlink()
    assert verify(copy).problems == [
        "layer_2.onnx is not the graph that config.json and the tensors give",
        "layer_3.onnx is missing",
    ]
    (copy / "decoder.onnx").write_bytes(b"\xff\xff nothing")
    assert any(problem.startswith("files: decoder.onnx is no ONNX graph") for problem in verify(copy).problems)


def test_experts_of_a_layer_are_alike_in_a_graph(source: Path) -> None:
    for pattern in (r"layers\.2\.mlp\.experts\.1\.up", r"layers\.2\.mlp\.experts\.\d\.gate"):
        with pytest.raises(InputError, match=r"layers\.2\.mlp\.experts would be stored in BF16, INT4; all of a layer are alike"):
            plan_export(source, Options("onnx", exclude=(pattern,)))
    assert plan_export(source, Options("onnx", exclude=(r"layers\.2\.mlp\.experts",))).experts() == {"trunk": 24, "mtp": 12}
