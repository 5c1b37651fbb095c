"""`glm5-port info`: whole checkpoints, broken ones, and a config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm5_port.cli.info import describe, render
from glm5_port.config import Glm5Config
from glm5_port.errors import ConfigError
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options
from tests.model import checkpoint_files as files
from tests.quant.exports import write_source
from tests.test_config import FULL_5_2, GLM_5, GLM_5_2


def config_file(directory: Path, content: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(content))
    return directory / "config.json"


@pytest.mark.parametrize("directory", [True, False])
def test_a_config_alone(tmp_path: Path, directory: bool) -> None:
    file = config_file(tmp_path, GLM_5_2)
    found = describe(tmp_path if directory else file)
    json.dumps(found)
    assert found["family"] == "GLM-5.2 / GLM-5.3"
    assert found["checkpoint"] is None
    assert found["parameters"]["trunk"] == 743_377_000_704
    assert found["described"] == {"tensors": 59_585, "bytes": 1_506_659_919_872}
    assert found["index_sharing"]["full_layers"] == list(FULL_5_2)
    assert found["index_sharing"]["pattern"].startswith("FFFSSSFSSSF")
    assert found["cache_bytes_per_token"]["fp8"]["total"] == 78 * 656 + 21 * 132
    assert [need["context"] for need in found["memory"] if need["cache_format"] == "plain"] == [4096, 32768, 131072, 1048576]
    text = render(found)
    for part in ("no weights here", "743,377,000,704", "90.46 KiB", "21 of 78 layers own one", "rope theta 8,000,000"):
        assert part in text


def test_the_parameters_of_glm_5_are_printed(tmp_path: Path, command_line: Callable[..., Any]) -> None:
    code, out, _ = command_line("info", str(config_file(tmp_path, GLM_5)))
    assert code == 0
    assert "743,911,199,232" in out
    assert "GLM-5 / GLM-5.1" in out


def test_which_latent_eps_is_used(tmp_path: Path) -> None:
    found = describe(config_file(tmp_path, {**GLM_5, "rms_norm_eps": 2e-5}))
    assert found["latent_norm_eps"] == {"load": 2e-5, "hugging_face": 1e-6, "rms_norm_eps": 2e-5}
    assert "2e-05 is what load uses; Hugging Face computes with 1e-06" in render(found)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_whole_checkpoint(tmp_path: Path, command_line: Callable[..., Any], quantize: bool) -> None:
    changes = {"quantization_config": files.FP8} if quantize else {}
    config = Glm5Config.from_dict({**files.SMALL, **changes})
    tensors = files.random_tensors(config)
    files.write(tmp_path, files.quantized(tensors, config) if quantize else tensors, shards=3, **changes)
    code, out, _ = command_line("info", str(tmp_path), "--json")
    assert code == 0
    found = json.loads(out)["checkpoint"]
    assert (found["files"], found["mtp_present"], found["problems"], found["stop_ids"]) == (3, True, "", [90, 91])
    assert found["bytes"] == json.loads(out)["described"]["bytes"] == sum(found["bytes_by_dtype"].values())
    assert set(found["bytes_by_dtype"]) == ({"BF16", "F32", "F8_E4M3"} if quantize else {"BF16", "F32"})
    assert found["block_fp8"] == ([128, 128] if quantize else None)
    text = command_line("info", str(tmp_path))[1]
    assert "whole: every name, shape and dtype is as expected" in text
    assert ("block-FP8 128 x 128" in text) is quantize
    assert "does not fit" not in text
    assert "656-byte row" in text, "the small latent does not fit the fixed rows, and the table says so"


@pytest.mark.parametrize(("options", "attention"), [(Options(), 0), (Options(include=("q_a_proj",), mtp="bf16"), 4)])
def test_what_is_int4_is_said(tmp_path: Path, command_line: Callable[..., Any], options: Options, attention: int) -> None:
    export(write_source(tmp_path / "source"), tmp_path / "int4", options)
    found = json.loads(command_line("info", str(tmp_path / "int4"), "--json")[1])
    expert = 64 * 96 * 3 * 4
    assert found["parameters"]["int4"] == {
        "routed experts": 3 * expert,
        **({"attention": attention * 64 * found["config"]["q_lora_rank"]} if attention else {"MTP layer": expert}),
    }
    text = " ".join(command_line("info", str(tmp_path / "int4"))[1].split())
    assert "checkpoint: INT4 in groups of 32, 1 file" in text
    assert f"routed experts {3 * expert:,} in INT4 " in text
    assert (f"MTP layer {found['parameters']['mtp']:,} {expert:,} of them in INT4" in text) is (attention == 0)
    assert " in INT4" not in render(describe(tmp_path / "source"))


def test_a_broken_checkpoint_is_told_and_fails(tmp_path: Path, command_line: Callable[..., Any]) -> None:
    tensors = files.random_tensors(Glm5Config.from_dict(files.SMALL))
    del tensors["model.norm.weight"]
    code, out, _ = command_line("info", str(files.write(tmp_path, tensors)))
    assert code == 1
    assert "NOT USABLE, see problems" in out
    assert "missing (1):\n    model.norm.weight" in out


def test_a_checkpoint_without_its_mtp_layer(tmp_path: Path) -> None:
    config = Glm5Config.from_dict(files.SMALL)
    found = describe(files.write(tmp_path, files.random_tensors(config, mtp=False)))
    assert (found["checkpoint"]["mtp_present"], found["checkpoint"]["problems"]) == (False, "")


def test_notes_are_shown(tmp_path: Path) -> None:
    content = {name: value for name, value in GLM_5.items() if name != "indexer_rope_interleave"}
    assert "vLLM and SGLang read its absence as half-split" in render(describe(config_file(tmp_path, content)))


def test_another_architecture_is_wrong_use(tmp_path: Path, command_line: Callable[..., Any]) -> None:
    code, out, err = command_line("info", str(config_file(tmp_path, {**GLM_5, "model_type": "glm5_next"})))
    assert (code, out) == (2, "")
    assert "GLM-5.3-Flash" in err
    with pytest.raises(ConfigError):
        describe(tmp_path / "nowhere")
