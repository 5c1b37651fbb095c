"""GPTQ: bits by plain loops, there and back, what verify finds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant.export import export
from glm5_port.quant.formats import exact_scales, find_format
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import pack_int4, unpack_int4
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.verify import verify
from tests.quant.exports import change, expert, plain_quantize, read_all, write_source
from tests.quant.formats import nibbles, numbered, words

GPTQ = find_format("gptq")
NAME = "layer.mlp.experts.0.up_proj.weight"
SHARDS = Options(format="gptq", max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("gptq") / "source")


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    export(source, tmp_path / "gptq", SHARDS)
    return tmp_path / "gptq"


def test_golden_word() -> None:
    """Input k of the one column has code k - 8: the word counts 0..7 from its lowest bits up."""
    codes = torch.arange(-8, 0, dtype=torch.int8).repeat(8, 1)
    parts = GPTQ.encode(NAME, pack_int4(codes), torch.full((8, 1), 0.5, dtype=torch.bfloat16))
    assert parts["layer.mlp.experts.0.up_proj.qweight"].tolist() == [[0x76543210] * 8]
    assert parts["layer.mlp.experts.0.up_proj.qzeros"].tolist() == [[0x77777777]]
    assert parts["layer.mlp.experts.0.up_proj.scales"].view(torch.int16).tolist() == [[0x3800] * 8]
    assert parts["layer.mlp.experts.0.up_proj.g_idx"].tolist() == [0] * 8


@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(16, 64, 2), (8, 96, 1), (24, 32, 4)])
def test_every_place_by_plain_loops(outputs: int, inputs: int, groups: int) -> None:
    codes, scales = numbered(outputs, inputs, groups)
    parts = {name.rpartition(".")[2]: tensor for name, tensor in GPTQ.encode(NAME, pack_int4(codes), scales).items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == {
        "qweight": (torch.int32, (inputs // 8, outputs)),
        "qzeros": (torch.int32, (groups, outputs // 8)),
        "scales": (torch.float16, (groups, outputs)),
        "g_idx": (torch.int32, (inputs,)),
    }
    for k in range(inputs):
        group = k // (inputs // groups)
        assert parts["g_idx"][k] == group
        for c in range(outputs):
            code = nibbles(int(parts["qweight"][k // 8, c]))[k % 8]
            zero = nibbles(int(parts["qzeros"][group, c // 8]))[c % 8] + 1  # version 1
            assert code - zero == codes[c, k]
            assert float(parts["scales"][group, c]) == float(scales[c, group])


def test_there_and_back() -> None:
    codes, scales = numbered(16, 64, 2)
    parts = GPTQ.encode(NAME, pack_int4(codes), scales)
    again, again_scales = GPTQ.decode(parts, NAME)
    assert torch.equal(unpack_int4(again), codes)
    assert torch.equal(again_scales.to(torch.bfloat16), scales)
    module = NAME.removesuffix("weight")
    version_2 = parts | {module + "qzeros": torch.full_like(parts[module + "qzeros"], 0x88888888 - 2**32)}
    assert torch.equal(unpack_int4(GPTQ.decode(version_2, NAME)[0]), codes)


def test_asymmetric_and_ordered_weights_are_refused() -> None:
    parts = GPTQ.encode(NAME, *words(16, 64, 2))
    module = NAME.removesuffix("weight")
    with pytest.raises(InputError, match="zeros are not all 8"):
        GPTQ.decode(parts | {module + "qzeros": parts[module + "qzeros"] - 1}, NAME)
    with pytest.raises(InputError, match="activation order"):
        GPTQ.decode(parts | {module + "g_idx": parts[module + "g_idx"].flip(0)}, NAME)
    with pytest.raises(CheckpointError, match="not of one matrix"):
        GPTQ.decode(parts | {module + "scales": parts[module + "scales"][:, :8]}, NAME)


def test_a_scale_that_float16_does_not_hold_is_refused_and_listed(tmp_path: Path) -> None:
    codes, scales = numbered(8, 64, 2)
    scales[3, 1] = 1.0078125 * 2.0**-20  # 1 + 2^-7: float16 has 4 bits left down there
    scales[5, 0] = 2.0**-30  # becomes zero
    with pytest.raises(InputError, match=r"2 of 16 scales are not exact in float16.*\[13, 1\] = 9\.61.*\[15, 0\]") as refused:
        exact_scales(scales, GPTQ.scale_dtype, NAME, "gptq", first=10)
    with pytest.raises(InputError, match="2 of 16 scales are no float16 numbers"):
        GPTQ.encode(NAME, pack_int4(codes), scales)
    assert NAME in str(refused.value)
    scales[3, 1], scales[5, 0] = 2.0**-20, 2.0**-24  # small, and exact
    assert torch.equal(GPTQ.decode(GPTQ.encode(NAME, pack_int4(codes), scales), NAME)[1].to(torch.bfloat16), scales)
    source = write_source(tmp_path / "source")
    change(source, lambda tensors: [t.mul_(1e-6) for n, t in tensors.items() if n == expert(2, 1, "up")])
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.experts\.1\.up_proj\.weight: .* not exact in float16"):
        export(source, tmp_path / "gptq", SHARDS)
    assert not (tmp_path / "gptq" / "config.json").exists()


def test_an_export_holds_what_the_quantiser_gives(source: Path, exported: Path) -> None:
    given, written = read_all(source), read_all(exported)
    for name, tensor in given.items():
        if ".mlp.experts." not in name:
            assert torch.equal(written.pop(name), tensor), name
            continue
        module = name.removesuffix("weight")
        parts = {module + part: written.pop(module + part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        codes, scales = plain_quantize(tensor)
        decoded = GPTQ.decode(parts, name)
        assert torch.equal(unpack_int4(decoded[0]), codes), name
        assert torch.equal(decoded[1].to(torch.float32), scales.to(torch.float32)), name
    assert not written
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert json.loads((exported / "quantize_config.json").read_text()) == config
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    assert verify(exported, source).problems == []
    assert verify(exported).problems == []


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_verify_finds_a_changed_word_of_any_part(source: Path, exported: Path, part: str) -> None:
    name = expert(2, 1, "down").removesuffix("weight") + part

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name].view(torch.int16).view(-1)[0] ^= 1

    change(exported, flip)
    found = verify(exported, source).problems
    assert any(problem.startswith(f"{name} is not what the source gives") for problem in found), found
    (exported / "int4_manifest.json").unlink()
    assert any(name in problem for problem in verify(exported, source).problems)


def test_verify_finds_missing_parts_and_a_config_that_does_not_match(source: Path, exported: Path) -> None:
    name = expert(1, 0, "gate").removesuffix("weight") + "scales"
    change(exported, lambda tensors: tensors.pop(name, None))
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    del config["quantization_config"]["dynamic"]["-:.*self_attn.*"]
    (exported / "config.json").write_text(json.dumps(config))
    found = "\n".join(verify(exported).problems)
    assert f"{name} is missing" in found
    assert "quantization_config.group_size = 64; the tensors have 32" in found
    assert "dynamic does not name modules that are not quantised" in found


def test_outputs_that_fill_no_word_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", hidden_size=64, moe_intermediate_size=96, q_lora_rank=20)
    with pytest.raises(InputError, match=r"20 outputs do not fill words of 8, as gptq packs them"):
        plan_export(source, Options(format="gptq", include=("q_a_proj",)))


def test_per_channel(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "gptq", Options(format="gptq", rule=Int4Rule("amax7", -1)))
    assert verify(tmp_path / "gptq", source).problems == []
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["group_size"] == -1
