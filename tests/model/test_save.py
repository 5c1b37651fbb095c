"""A trained model written as a checkpoint: the same bits when it is read again, by this library and by transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import glm5_port
from glm5_port.errors import CheckpointError, ExportError, InputError
from glm5_port.model import save
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.save import save_checkpoint
from glm5_port.quant.qat import prepare_qat
from tests.model.checkpoint_files import FP8, quantized
from tests.model.hugging_face import make
from tests.model.int4_checkpoints import int4_export, int4_source
from tests.model.models import quick_config, quick_model
from tests.quant.exports import digests, read_all

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A bf16 checkpoint with an MTP layer, a tokenizer, and a config.json whose text is not ours."""
    directory = int4_source(tmp_path / "source")
    config = json.loads((directory / "config.json").read_text())
    text = '{ "zz_unknown_note": null,\n' + json.dumps(config, indent=7)[1:]
    (directory / "config.json").write_text(text.replace('"zz_unknown_note": null,\n', ""))
    (directory / "tokenizer.json").write_text('{"é": 1}', encoding="utf-8")
    (directory / "generation_config.json").write_text('{"eos_token_id": [39]}')
    return directory


def trained(directory: Path, **options: Any) -> Glm5Model:
    """A model in float32 after a step that moved every weight."""
    model = glm5_port.load(directory, backend="cpu", dtype="float32", trainable=True, **options)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 1e-3)
    return model


def state(model: Glm5Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("options", [{"mtp": True}, {"mtp": True, "max_context": 6}], ids=["sparse", "dense"])
def test_what_is_read_again_is_the_model(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(source, **options)
    save_checkpoint(model, tmp_path / "saved")
    again = glm5_port.load(tmp_path / "saved", backend="cpu", trainable=True, **options)
    assert again.dtype == torch.float32, "config.json says what is stored"
    assert same(state(model), state(again))
    with torch.no_grad():
        assert torch.equal(model(TOKENS[:, :6]), again(TOKENS[:, :6]))


def test_an_untrained_model_gives_the_bytes_of_its_source(source: Path, tmp_path: Path) -> None:
    """Every tensor, MTP layer and indexers included, whatever the model held of them; config.json letter by letter."""
    for number, options in enumerate(({}, {"mtp": True}, {"max_context": 4, "dtype": "float32"})):
        model = glm5_port.load(source, backend="cpu", trainable=True, **options)
        save_checkpoint(model, tmp_path / str(number), dtype="bfloat16", max_shard_bytes=60_000)
        assert same(read_all(source), read_all(tmp_path / str(number)))
        assert len(list((tmp_path / str(number)).glob("*.safetensors"))) > 3
        for file in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (tmp_path / str(number) / file).read_bytes() == (source / file).read_bytes()


def test_layers_that_the_model_does_not_hold_are_carried(source: Path, tmp_path: Path) -> None:
    model = trained(source)
    save_checkpoint(model, tmp_path / "saved")
    before, after = read_all(source), read_all(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].float()) == (".layers.5." in name), name
    glm5_port.load(tmp_path / "saved", backend="cpu", mtp=True)


def test_without_a_source_the_config_is_that_of_the_model(tmp_path: Path) -> None:
    model = quick_model(quick_config(), dtype=torch.float32, trainable=True)
    save_checkpoint(model, tmp_path / "saved")
    again = glm5_port.load(tmp_path / "saved", backend="cpu", trainable=True)
    assert same(state(model), state(again))
    dense = quick_model(quick_config(), dtype=torch.float32, trainable=True, max_context=4)
    with pytest.raises(InputError, match=r"indexer.*\n.*source="):
        save_checkpoint(dense, tmp_path / "other")
    save_checkpoint(dense, tmp_path / "other", source=tmp_path / "saved")
    assert read_all(tmp_path / "other").keys() == read_all(tmp_path / "saved").keys()


def test_block_fp8_is_written_as_floats(tmp_path: Path) -> None:
    plain = int4_source(tmp_path / "plain")
    config = glm5_port.Glm5Config.from_json(plain)
    (tmp_path / "fp8").mkdir()
    save_file(quantized(read_all(plain), config), tmp_path / "fp8" / "model.safetensors")
    fields = {**json.loads((plain / "config.json").read_text()), "quantization_config": FP8}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(fields))
    model = glm5_port.load(tmp_path / "fp8", backend="cpu", dtype="float32", trainable=True, mtp=True)
    save_checkpoint(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert same(state(model), state(glm5_port.load(tmp_path / "saved", backend="cpu", trainable=True, mtp=True)))


def test_a_prepared_model_is_written_as_its_masters(source: Path, tmp_path: Path) -> None:
    model = trained(source)
    save_checkpoint(model, tmp_path / "before")
    prepare_qat(model, patterns=[r"self_attn\.(q_a|o)_proj", "indexer.wq_b"], learned_scales=True)
    save_checkpoint(model, tmp_path / "after")
    assert digests(tmp_path / "before") == digests(tmp_path / "after")


def test_transformers_reads_it_and_is_written_alike(tmp_path: Path) -> None:
    from transformers import GlmMoeDsaForCausalLM

    theirs = make(tmp_path / "theirs", seed=2)
    model = trained(tmp_path / "theirs", latent_norm_eps=1e-6)
    save_checkpoint(model, tmp_path / "ours")
    read = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    save_checkpoint(read, tmp_path / "again", source=tmp_path / "ours")
    assert same(read_all(tmp_path / "again"), read_all(tmp_path / "ours"))
    save_checkpoint(theirs, tmp_path / "first")
    assert same(read_all(tmp_path / "first"), read_all(tmp_path / "theirs"))


def test_weights_stream(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor at a time: nothing is gathered before it is written."""
    alive: list[int] = []
    seen: list[tuple[int, int]] = []
    write = save._write

    def watch(target: Any, name: str, tensor: Tensor) -> str:
        alive.append(tensor.numel())
        return write(target, name, tensor)

    monkeypatch.setattr(save, "_write", watch)
    model = glm5_port.load(source, backend="cpu", trainable=True)
    save_checkpoint(model, tmp_path / "saved", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(alive) == seen[-1][0] == seen[-1][1] == len(read_all(source))


# -- what is refused ---------------------------------------------------------------------------------------------------------


def not_a_number(model: Glm5Model, tmp_path: Path) -> None:
    with torch.no_grad():
        model.layers[2].mlp.experts.gate_up[3, 20, 7] = float("nan")
    save_checkpoint(model, tmp_path / "saved")


REFUSED: dict[str, tuple[Callable[[Glm5Model, Path], object], type[Exception], str]] = {
    "nan": (not_a_number, InputError, r"layers\.2\.mlp\.experts\.3\.gate_proj\.weight\[20, 7\] is nan"),
    "dtype": (lambda m, p: save_checkpoint(m, p / "saved", dtype="float23"), InputError, "did you mean float32"),
    "wide": (lambda m, p: save_checkpoint(m, p / "saved", dtype=torch.float64), InputError, "supported: bfloat16"),
    "full": (lambda m, p: save_checkpoint(m, p / "source"), ExportError, "is there already"),
    "other": (lambda m, p: save_checkpoint(m, p / "saved", source=int4_source(p / "b", v_head_dim=8)), CheckpointError, "shapes"),
    "int4": (
        lambda m, p: save_checkpoint(m, p / "saved", source=int4_export(p / "c", ())),
        CheckpointError,
        "not the checkpoint",
    ),
    "module": (lambda m, p: save_checkpoint(m.layers[0], p / "saved"), InputError, "DecoderLayer is not known here"),
    "inference": (
        lambda m, p: save_checkpoint(glm5_port.load(p / "source", backend="cpu"), p / "saved"),
        InputError,
        "trainable=True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_leaves_nothing(source: Path, tmp_path: Path, case: str) -> None:
    run, kind, said = REFUSED[case]
    before, model = digests(source), trained(source)
    with pytest.raises(kind, match=said):
        run(model, tmp_path)
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "saved.part").exists()
    assert digests(source) == before


def test_a_full_disk_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExportError, match="No space left on device"):
        save_checkpoint(trained(source), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "saved.part").exists()
