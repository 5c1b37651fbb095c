"""Plans: every expert matrix of the released models is counted from config.json alone; config.json keeps its text."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from glm5_port.config import released
from glm5_port.errors import CheckpointError, ConfigError, InputError
from glm5_port.quant.config_text import with_quantization, without_quantization
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.sizes import parse_bytes, show_bytes
from glm5_port.quant.writing import spread
from tests.quant.exports import SMALL_SHARDS, expert, write_source


@pytest.fixture(scope="module")
def glm5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm5")
    (directory / "config.json").write_text(json.dumps(released("GLM-5").as_dict()))
    return directory


@pytest.mark.slow
def test_counts_every_expert_matrix_of_glm5_from_its_config_alone(glm5: Path) -> None:
    plan = plan_export(glm5, Options())
    assert plan.experts() == {"trunk": 75 * 256 * 3, "mtp": 256 * 3} == {"trunk": 57_600, "mtp": 768}
    # 4.5 bits for each of the 75 * 256 experts' 3 * 6144 * 2048 weights, and 8 bytes for each matrix's shape
    trunk = sum(tensor.bytes for tensor in plan.quantized if not tensor.mtp)
    assert trunk == 75 * 256 * 3 * (6144 * 2048 * 9 // 16 + 8)
    assert not plan.has_weights
    assert plan.source_bytes == 1_507_728_316_928
    assert plan.bytes == sum(shard.bytes for shard in plan.shards)
    assert all(shard.bytes <= 5 * 10**9 + len(shard.fixed[0]) for shard in plan.shards)
    carried = plan_export(glm5, Options(mtp="bf16"))
    assert carried.experts() == {"trunk": 57_600, "mtp": 0}
    assert r"re:.*layers\.78\..*" in json.loads(carried.config_text)["quantization_config"]["ignore"]


def test_every_shard_stays_below_the_limit_and_every_place_is_its_own(tmp_path: Path) -> None:
    plan = plan_export(write_source(tmp_path / "source"), SMALL_SHARDS)
    assert len(plan.shards) > 3
    for shard in plan.shards:
        assert sum(tensor.bytes for tensor in shard.tensors) <= 100_000
        firsts = {o.name: (shard.places[o.name].first, o.bytes) for t in shard.tensors for o in t.outputs}
        ranges = sorted((first, first + size) for first, size in firsts.values())
        assert ranges[0][0] == len(shard.fixed[0])
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] == shard.bytes
    names = [output.name for tensor in plan.tensors for output in tensor.outputs]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files"), [("gguf", 116), ("onnx", 80)])
def test_counts_them_in_other_files_too(glm5: Path, name: str, files: int) -> None:
    plan = plan_export(glm5, Options(format=name))
    assert plan.experts() == {"trunk": 57_600, "mtp": 768}
    scales = 2 if name == "gguf" else 4
    assert sum(tensor.bytes for tensor in plan.quantized) == (57_600 + 768) * 6144 * 2048 // 32 * (16 + scales)
    assert len(plan.shards) == files
    assert plan.bytes - sum(tensor.bytes for tensor in plan.tensors) < 0.001 * plan.bytes  # headers and alignment


@pytest.mark.parametrize("name", ["gguf", "onnx", "onnx-float16"])
def test_every_byte_of_other_files_has_one_owner(tmp_path: Path, name: str) -> None:
    plan = plan_export(write_source(tmp_path / "source"), replace(SMALL_SHARDS, format=name))
    for shard in plan.shards:
        owners = bytearray(shard.bytes)
        for place, data in shard.fixed.items():
            owners[place : place + len(data)] = b"h" * len(data)
        for output in (output for tensor in shard.tensors for output in tensor.outputs):
            for part, first in spread(shard.places[output.name], 0, memoryview(b"p" * output.bytes)):
                assert owners[first : first + len(part)] == bytes(len(part)), output.name
                owners[first : first + len(part)] = part
        gaps = len(owners) - owners.count(b"h") - owners.count(b"p")
        assert gaps < (32 if name == "gguf" else 4096) * (len(shard.places) + 1)
    written = [output.name for shard in plan.shards for tensor in shard.tensors for output in tensor.outputs]
    assert sorted(written) == sorted(name for shard in plan.shards for name in shard.places)
    assert len(set(written)) == len(written)


def test_only_routed_experts_by_default_and_more_or_less_by_pattern(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")

    def quantized(**options: object) -> list[str]:
        return [tensor.name for tensor in plan_export(source, Options(**options)).quantized]  # type: ignore[arg-type]

    experts = quantized()
    assert len(experts) == 3 * 4 * 3 + 4 * 3
    assert all(".mlp.experts." in name for name in experts)
    shared = quantized(include=(r"shared_experts",))
    assert set(shared) - set(experts) == {
        f"model.layers.{layer}.mlp.shared_experts.{p}_proj.weight" for layer in (1, 2, 3, 4) for p in ("gate", "up", "down")
    }
    assert set(experts) - set(quantized(exclude=(r"layers\.1\.",))) == {n for n in experts if n.startswith("model.layers.1.")}
    with pytest.raises(InputError, match="finds no projection"):  # a router is never quantised, not even by pattern
        quantized(include=(r"mlp\.gate\.weight",))
    with pytest.raises(InputError, match="finds no tensor"):
        quantized(exclude=("nothing",))
    with pytest.raises(InputError, match="no regular expression"):
        quantized(include=("(",))
    with pytest.raises(InputError, match="nothing would be quantised"):
        quantized(exclude=("experts",))


def test_ignore_names_every_matrix_that_is_not_quantised_and_none_that_is(tmp_path: Path) -> None:
    from glm5_port.quant.formats.compressed_tensors import ignores

    source = write_source(tmp_path / "source")
    for options in (Options(), Options(mtp="bf16"), Options(include=("shared_experts",)), Options(exclude=(r"experts\.2\.",))):
        plan = plan_export(source, options)
        ignore = json.loads(plan.config_text)["quantization_config"]["ignore"]
        for tensor in plan.tensors:
            if len(tensor.source.shape) == 2 and tensor.component != "embedding":
                module = tensor.name.removesuffix(".weight")
                assert any(ignores(entry, module) for entry in ignore) == (tensor.action != "int4"), (options, module)


def test_group_that_does_not_divide_is_one_clear_error(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    with pytest.raises(InputError, match=rf"{expert(1, 0, 'gate')}: rows of 64 weights cannot be quantised in groups of 128"):
        plan_export(source, Options(rule=Int4Rule(group_size=128)))


def test_half_a_checkpoint_is_refused_with_names(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: missing"):
        plan_export(source, Options())
    with pytest.raises(CheckpointError, match="not a directory"):
        plan_export(tmp_path / "nowhere", Options())


def test_unknown_names_are_errors_with_suggestions() -> None:
    with pytest.raises(InputError, match="did you mean compressed-tensors"):
        Options(format="compressed_tensors")
    with pytest.raises(InputError, match="mtp = 'fp8' is not known"):
        Options(mtp="fp8")


@pytest.mark.parametrize(
    "text",
    ['{\n  "a": 1.0e-5,\n  "b": [1,   2],\n  "c": {"d": "}"}\n}\n', '{"a": 1, "b": {}}', "{}", '{\n    "a": "\\u00e9"\n}'],
)
def test_config_text_changes_in_one_place_only(text: str) -> None:
    block = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    changed = with_quantization(text, block)
    assert json.loads(changed) == {**json.loads(text), "quantization_config": block}
    assert without_quantization(changed) == text or text == "{}"
    kept = changed[: changed.index('"quantization_config"')].rstrip().rstrip(",")
    assert text.startswith(kept)
    again = with_quantization(changed, {"other": 1})  # replaced where it stands
    assert json.loads(again)["quantization_config"] == {"other": 1}
    assert without_quantization(again) == without_quantization(changed)


def test_block_in_the_middle_is_replaced_where_it_stands() -> None:
    text = '{\n  "a": 1,\n  "quantization_config": {"quant_method": "fp8"},\n  "b": 2\n}'
    changed = with_quantization(text, {"x": 1})
    assert changed == '{\n  "a": 1,\n  "quantization_config": {\n    "x": 1\n  },\n  "b": 2\n}'
    assert json.loads(without_quantization(text)) == {"a": 1, "b": 2}
    first = '{"quantization_config": {}, "b": 2}'
    assert json.loads(without_quantization(first)) == {"b": 2}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a" 1}', '{"a": 1,}'])
def test_config_text_that_is_no_object(text: str) -> None:
    with pytest.raises(ConfigError, match="no JSON object"):
        with_quantization(text, {})


def test_sizes() -> None:
    assert parse_bytes("2GiB", "--memory") == 2 * 2**30
    assert parse_bytes("5GB", "--memory") == 5 * 10**9
    assert parse_bytes(" 1.5 mb ", "--memory") == 1_500_000
    assert parse_bytes("77", "--memory") == 77
    for wrong in ("", "0", "-1GB", "2 parsecs", "GiB"):
        with pytest.raises(InputError, match="--memory"):
            parse_bytes(wrong, "--memory")
    assert show_bytes(451_994_677_224) == "452.0 GB"
    assert show_bytes(999) == "999 bytes"
