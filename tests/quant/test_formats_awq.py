"""AWQ GEMM: bits by plain loops, there and back, what verify finds, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant.export import export
from glm5_port.quant.formats import find_format
from glm5_port.quant.packing import pack_int4, unpack_int4
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.verify import verify
from tests.quant.exports import change, expert, plain_quantize, read_all, write_source
from tests.quant.formats import nibbles, numbered

AWQ = find_format("awq")
NAME = "layer.mlp.experts.0.up_proj.weight"
SHARDS = Options(format="awq", max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("awq") / "source")


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    export(source, tmp_path / "awq", SHARDS)
    return tmp_path / "awq"


def test_golden_word() -> None:
    """Output c has code c - 8 everywhere, so a word spells the order of its outputs: 0 2 4 6 1 3 5 7 from the low bits."""
    codes = torch.arange(-8, 0, dtype=torch.int8).unsqueeze(1).repeat(1, 8)
    parts = AWQ.encode(NAME, pack_int4(codes), torch.full((8, 1), 0.5, dtype=torch.bfloat16))
    assert parts["layer.mlp.experts.0.up_proj.qweight"].tolist() == [[0x75316420]] * 8
    assert parts["layer.mlp.experts.0.up_proj.qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert parts["layer.mlp.experts.0.up_proj.scales"].view(torch.int16).tolist() == [[0x3800] * 8]


@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(16, 64, 2), (8, 96, 1), (24, 32, 4)])
def test_every_place_by_plain_loops(outputs: int, inputs: int, groups: int) -> None:
    codes, scales = numbered(outputs, inputs, groups)
    parts = {name.rpartition(".")[2]: tensor for name, tensor in AWQ.encode(NAME, pack_int4(codes), scales).items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == {
        "qweight": (torch.int32, (inputs, outputs // 8)),
        "qzeros": (torch.int32, (groups, outputs // 8)),
        "scales": (torch.float16, (groups, outputs)),
    }
    columns = [0, 2, 4, 6, 1, 3, 5, 7]
    for k in range(inputs):
        group = k // (inputs // groups)
        for word in range(outputs // 8):
            stored, zeros = nibbles(int(parts["qweight"][k, word])), nibbles(int(parts["qzeros"][group, word]))
            for place, column in enumerate(columns):
                assert stored[place] - zeros[place] == codes[8 * word + column, k]
        for c in range(outputs):
            assert float(parts["scales"][group, c]) == float(scales[c, group])


def test_there_and_back_and_what_is_refused() -> None:
    codes, scales = numbered(16, 64, 2)
    parts = AWQ.encode(NAME, pack_int4(codes), scales)
    again, again_scales = AWQ.decode(parts, NAME)
    assert torch.equal(unpack_int4(again), codes)
    assert torch.equal(again_scales.to(torch.bfloat16), scales)
    module = NAME.removesuffix("weight")
    with pytest.raises(InputError, match="zeros are not all 8"):
        AWQ.decode(parts | {module + "qzeros": parts[module + "qzeros"] + 1}, NAME)
    with pytest.raises(CheckpointError, match="not of one matrix"):
        AWQ.decode(parts | {module + "scales": parts[module + "scales"][:, :8]}, NAME)
    scales[0, 0] = 1.0078125 * 2.0**-20
    with pytest.raises(InputError, match=r"1 of 32 scales are no float16 numbers.*\[0, 0\]"):
        AWQ.encode(NAME, pack_int4(codes), scales)


def test_an_export_holds_what_the_quantiser_gives(source: Path, exported: Path) -> None:
    given, written = read_all(source), read_all(exported)
    for name, tensor in given.items():
        if ".mlp.experts." not in name:
            assert torch.equal(written.pop(name), tensor), name
            continue
        module = name.removesuffix("weight")
        codes, scales = plain_quantize(tensor)
        decoded = AWQ.decode({module + part: written.pop(module + part) for part in ("qweight", "qzeros", "scales")}, name)
        assert torch.equal(unpack_int4(decoded[0]), codes), name
        assert torch.equal(decoded[1].to(torch.float32), scales.to(torch.float32)), name
    assert not written
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"], config["version"]) == ("awq", 4, 32, "gemm")
    left_out = config["modules_to_not_convert"]
    modules = [name.removesuffix(".weight") for name, tensor in given.items() if tensor.dim() == 2 and "embed" not in name]
    for module in modules:  # as loaders look: any entry anywhere in the name
        assert any(entry in module for entry in left_out) == (".mlp.experts." not in module), module
        skipped = any(re.match(entry.removeprefix("-:"), module) for entry in config["dynamic"])  # as GPT-QModel looks
        assert skipped == (".mlp.experts." not in module), module
    beside = json.loads((exported / "quant_config.json").read_text())
    assert (beside["dynamic"], beside["modules_to_not_convert"]) == (config["dynamic"], left_out)
    assert verify(exported, source).problems == []
    assert verify(exported).problems == []


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_verify_finds_a_changed_word_of_any_part(source: Path, exported: Path, part: str) -> None:
    name = expert(2, 1, "down").removesuffix("weight") + part

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name].view(torch.int16).view(-1)[0] ^= 1

    change(exported, flip)
    assert any(problem.startswith(f"{name} is not what the source gives") for problem in verify(exported, source).problems)


def test_verify_finds_a_config_that_leaves_the_wrong_modules_out(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "mlp.experts.1."]
    (exported / "config.json").write_text(json.dumps(config))
    found = "\n".join(verify(exported).problems)
    assert "modules_to_not_convert names modules that are quantised" in found
    assert "modules_to_not_convert does not name modules that are not quantised" in found


def test_verify_finds_patterns_of_gptqmodel_that_are_wrong_and_wants_none(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:^lm_head$": {}}
    (exported / "config.json").write_text(json.dumps(config))
    assert "dynamic does not name modules that are not quantised" in "\n".join(verify(exported).problems)
    del config["quantization_config"]["dynamic"]
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "int4_manifest.json").unlink()
    assert verify(exported).problems == []


def test_outputs_that_fill_no_word_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", q_lora_rank=20)
    with pytest.raises(InputError, match=r"20 outputs do not fill words of 8, as awq packs them"):
        plan_export(source, Options(format="awq", include=("q_a_proj",)))
