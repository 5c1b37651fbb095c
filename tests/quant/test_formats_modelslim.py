"""msModelSlim: bits by plain loops, the kernel's identity, types of all tensors, INT8 of the rest, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant.export import export
from glm5_port.quant.formats import find_format
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import pack_int4, unpack_int4
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.verify import verify
from tests.quant.exports import change, digests, plain_quantize, read_all, write_source
from tests.quant.formats import numbered, words

MODELSLIM = find_format("modelslim")
UP, DOWN = "layer.mlp.experts.0.up_proj.weight", "layer.mlp.experts.0.down_proj.weight"
PER_CHANNEL = Options(format="modelslim", rule=Int4Rule("amax7", -1), max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("modelslim") / "source")


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    export(source, source.parent / "modelslim", PER_CHANNEL, workers=2)
    return source.parent / "modelslim"


def test_golden_bytes() -> None:
    """Channel 0 has the code 7, channel 1 the code -8: two's complement, channel 0 in the low bits."""
    codes = torch.tensor([[7] * 8, [-8] * 8, [-1] * 8, [1] * 8], dtype=torch.int8)
    parts = MODELSLIM.encode(UP, pack_int4(codes), torch.tensor([[0.5], [0.25], [2.0], [1.0]], dtype=torch.bfloat16))
    assert parts[UP].view(torch.uint8).tolist() == [[0x87] * 8, [0x1F] * 8]
    assert parts[UP + "_scale"].tolist() == [[0.5], [0.25], [2.0], [1.0]]
    assert parts[UP + "_offset"].tolist() == [[0.0]] * 4
    assert parts["layer.mlp.experts.0.up_proj.scale_bias"].tolist() == [[8 * 56 * 0.5], [8 * -64 * 0.25], [-128.0], [64.0]]


@pytest.mark.parametrize(("name", "parts"), [(UP, 1), (DOWN, 16)])
def test_every_place_by_plain_loops(name: str, parts: int) -> None:
    outputs, inputs = 16, 64
    codes, scales = numbered(outputs, inputs, 1)
    tensors = MODELSLIM.encode(name, pack_int4(codes), scales)
    bias = tensors[name.removesuffix("weight") + "scale_bias"]
    assert {key.rpartition(".")[2]: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == {
        "weight": (torch.int8, (outputs // 2, inputs)),
        "weight_scale": (torch.float32, (outputs, 1)),
        "weight_offset": (torch.float32, (outputs, 1)),
        "scale_bias": (torch.float32, (outputs, parts)),
    }
    for r in range(outputs // 2):
        for k in range(inputs):
            byte = int(tensors[name][r, k]) & 0xFF
            for channel, nibble in ((2 * r, byte & 15), (2 * r + 1, byte >> 4)):
                assert (nibble - 16 if nibble >= 8 else nibble) == codes[channel, k]
    for channel in range(outputs):
        scale = float(scales[channel, 0])
        assert float(tensors[name + "_scale"][channel, 0]) == scale
        for part in range(parts):
            inside = range(part * inputs // parts, (part + 1) * inputs // parts)
            assert float(bias[channel, part]) == 8 * sum(int(codes[channel, k]) for k in inside) * scale
    again = MODELSLIM.decode(tensors, name)
    assert torch.equal(unpack_int4(again[0]), codes)
    assert torch.equal(again[1].to(torch.bfloat16), scales)


def test_scale_bias_is_what_the_kernel_lacks() -> None:
    """The kernel multiplies high halves 16 * (x >> 4) and low halves (x & 15) - 8 by the codes; what is missing is the bias."""
    codes, scales = numbered(16, 64, 1)
    bias = MODELSLIM.encode(DOWN, pack_int4(codes), scales)["layer.mlp.experts.0.down_proj.scale_bias"].to(torch.float64).sum(1)
    x = torch.randint(-128, 128, (5, 64), generator=torch.Generator().manual_seed(0))
    values = (codes.to(torch.float64) * scales.to(torch.float64)).T
    halves = 16 * ((x >> 4).to(torch.float64) @ values) + ((x & 15).to(torch.float64) - 8) @ values
    assert torch.equal(halves + bias, x.to(torch.float64) @ values)


def test_scale_bias_is_exact_at_the_widths_of_glm5() -> None:
    codes = torch.full((2, 6144), 7, dtype=torch.int8)
    scales = torch.full((2, 1), 1.9921875, dtype=torch.bfloat16)  # eight ones
    bias = MODELSLIM.encode(UP, pack_int4(codes), scales)["layer.mlp.experts.0.up_proj.scale_bias"]
    assert float(bias[0, 0]) == 8 * 7 * 6144 * 1.9921875


def test_damage_is_found_when_decoding() -> None:
    tensors = MODELSLIM.encode(UP, *words(16, 64, 1))
    bias = "layer.mlp.experts.0.up_proj.scale_bias"
    with pytest.raises(CheckpointError, match="scale_bias is not 8"):
        MODELSLIM.decode(tensors | {bias: tensors[bias] * 2}, UP)
    with pytest.raises(CheckpointError, match="scale_bias is not 8"):
        MODELSLIM.decode(tensors | {UP: tensors[UP] ^ 1}, UP)
    with pytest.raises(CheckpointError, match="offset is not zero"):
        MODELSLIM.decode(tensors | {UP + "_offset": tensors[UP + "_scale"]}, UP)
    with pytest.raises(CheckpointError, match="not of one matrix"):
        MODELSLIM.decode(tensors | {UP + "_scale": tensors[UP + "_scale"][:8]}, UP)


def test_types_and_values_of_every_tensor(source: Path, exported: Path) -> None:
    given, written = read_all(source), read_all(exported)
    described = json.loads((exported / "quant_model_description.json").read_text())
    assert (described.pop("version"), described.pop("group_size")) == ("1.0.0", 0)
    assert [described.pop(key) for key in ("model_quant_type", "metadata", "optional")] == ["W8A8_DYNAMIC", {}, {}]
    assert set(described) == set(written)
    counts = {"FLOAT": 0, "W8A8_DYNAMIC": 0, "W4A8_DYNAMIC": 0}
    for name, tensor in given.items():
        module, float_parts = name.removesuffix("weight"), (".kv_b_proj.", ".indexer.wk.", ".weights_proj.", ".mlp.gate.")
        is_mtp = name.startswith("model.layers.4.")
        counts[described[name]] += 1
        if tensor.dim() < 2 or is_mtp or "model.layers" not in name or any(part in name for part in float_parts):
            assert described[name] == "FLOAT", name
            assert torch.equal(written[name], tensor), name
        elif ".mlp.experts." in name:
            parts = {key: written[key] for key in (name, name + "_scale", name + "_offset", module + "scale_bias")}
            assert {described[key] for key in parts} == {"W4A8_DYNAMIC"}
            codes, scales = plain_quantize(tensor, tensor.shape[1])
            decoded = MODELSLIM.decode(parts, name)
            assert torch.equal(unpack_int4(decoded[0]), codes), name
            assert torch.equal(decoded[1], scales.to(torch.float32)), name
        else:
            assert {described[key] for key in (name, name + "_scale", name + "_offset")} == {"W8A8_DYNAMIC"}
            scale = tensor.to(torch.float32).abs().amax(1, keepdim=True) / 127
            assert torch.equal(written[name + "_scale"], scales := scale), name
            assert torch.equal(written[name], (tensor.to(torch.float32) / scales).round().to(torch.int8)), name
            assert int(written[name].abs().max()) == 127
            assert not written[name + "_offset"].any()
    assert counts["W4A8_DYNAMIC"] == 36
    assert counts["W8A8_DYNAMIC"] == 4 * 4 + 2 + 3 + 3 * 3  # attention, indexer queries, dense MLP, shared experts


def test_files_are_named_as_vllm_ascend_looks_for_them(source: Path, exported: Path) -> None:
    index = json.loads((exported / "quant_model_weights.safetensors.index.json").read_text())
    written = read_all(exported)
    assert set(index["weight_map"]) == set(written)
    assert all((exported / file).exists() for file in index["weight_map"].values())
    assert all(file.startswith("quant_model_weights-") for file in index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert json.loads((exported / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not list(exported.glob("model*"))


def test_a_config_of_block_fp8_loses_its_quantization_config(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", fp8=True)
    export(source, tmp_path / "modelslim", PER_CHANNEL)
    assert "quantization_config" not in json.loads((tmp_path / "modelslim" / "config.json").read_text())
    described = json.loads((tmp_path / "modelslim" / "quant_model_description.json").read_text())
    assert described["model.layers.0.self_attn.o_proj.weight"] == "W8A8_DYNAMIC"
    assert described["model.layers.0.self_attn.kv_b_proj.weight"] == "FLOAT"
    assert read_all(tmp_path / "modelslim")["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.bfloat16
    assert not any(name.endswith("_scale_inv") for name in described)


def test_groups_are_refused_with_the_reason(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"one scale for each output channel, not groups of 32: vllm-ascend refuses W4A8"
    ) as refused:
        export(source, tmp_path / "modelslim", Options(format="modelslim"))
    assert "--group-size -1" in str(refused.value)
    assert not (tmp_path / "modelslim").exists()


def test_what_the_format_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="INT4 for routed experts only"):
        plan_export(source, Options(format="modelslim", rule=Int4Rule("amax7", -1), include=("o_proj",)))
    odd = write_source(tmp_path / "odd", moe_intermediate_size=24)
    with pytest.raises(InputError, match=r"down_proj in 16 parts"):
        plan_export(odd, PER_CHANNEL)
    broken = write_source(tmp_path / "broken")
    name = "model.layers.0.self_attn.o_proj.weight"
    change(broken, lambda tensors: [tensor[0].fill_(float("nan")) for key, tensor in tensors.items() if key == name])
    with pytest.raises(InputError, match=rf"{name}: 1 rows from row 0 on hold NaN or infinity"):
        export(broken, tmp_path / "modelslim", PER_CHANNEL)


def test_the_mtp_layer_stays_and_a_note_says_so(source: Path) -> None:
    plan = plan_export(source, PER_CHANNEL)
    assert plan.experts() == {"trunk": 36, "mtp": 0}
    assert any("MTP layer is carried" in note for note in plan.notes)


def test_any_number_of_workers_writes_the_same_bytes(source: Path, exported: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "again", PER_CHANNEL, workers=1)
    assert digests(tmp_path / "again") == digests(exported)


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "damaged")
    return tmp_path / "damaged"


def test_verify_finds_nothing_wrong(source: Path, exported: Path) -> None:
    found = verify(exported, source)
    assert found.problems == []
    assert found.notes == []
    assert "36 quantised weights: codes, scales and shapes" in found.checked
    assert "30 INT8 weights: codes, scales and offsets" in found.checked
    assert verify(exported).problems == []


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("mlp.experts.0.up_proj.weight", "scale_bias is not 8 * the sum of code * scale"),
        ("mlp.experts.0.up_proj.scale_bias", "scale_bias is not 8 * the sum of code * scale"),
        ("mlp.experts.0.down_proj.weight_offset", "offset is not zero"),
        ("self_attn.o_proj.weight_offset", "1 offsets that are not zero"),
        ("self_attn.o_proj.weight_scale", "1 scales that are not positive and finite"),
        ("self_attn.q_b_proj.weight", "1 rows without a code of magnitude 127, or with -128"),
    ],
)
def test_verify_finds_damage(source: Path, damaged: Path, name: str, finding: str) -> None:
    name = f"model.layers.2.{name}"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors and name.endswith("q_b_proj.weight"):
            tensors[name][0, 0] = -128
        elif name in tensors:
            tensors[name].view(-1)[0] = -3

    change(damaged, damage)
    (damaged / "int4_manifest.json").write_text(edited_manifest(damaged))
    found = verify(damaged).problems
    assert any(finding in problem for problem in found), found
    assert any(problem.startswith(f"{name} is not what the source gives") for problem in verify(damaged, source).problems)


def edited_manifest(directory: Path) -> str:
    """The manifest with the sha256 of what is there now, so that only the values themselves can tell."""
    manifest = json.loads((directory / "int4_manifest.json").read_text())
    current = digests(directory)
    manifest["files"] = {name: entry | {"sha256": current[name]} for name, entry in manifest["files"].items()}
    return json.dumps(manifest)


def test_verify_finds_missing_parts_types_and_a_config_that_does_not_match(source: Path, damaged: Path) -> None:
    gone = ("model.layers.1.mlp.experts.0.up_proj.scale_bias", "model.layers.1.self_attn.o_proj.weight_scale")
    change(damaged, lambda tensors: [tensors.pop(name, None) for name in gone])
    description = damaged / "quant_model_description.json"
    description.write_text(description.read_text().replace("W4A8_DYNAMIC", "W8A8_DYNAMIC"))
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "ascend"}}))
    found = verify(damaged, source).problems
    assert f"{gone[1]} is missing" in found
    assert any(gone[0] in problem and "missing" in problem for problem in found)
    assert any("config.json has a quantization_config" in problem for problem in found)
    assert "quant_model_description.json is not what an export of this source writes" in found
