"""`glm5_port.load`: every option, from a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, ConfigError, FlagError, GradientError, InputError, SelectionError
from glm5_port.model.build import build
from glm5_port.model.tensors import expected_tensors
from tests.model.checkpoint_files import SMALL, random_tensors, write

CONFIG = Glm5Config.from_dict(SMALL)
TOKENS = torch.tensor([[5, 17, 80, 3, 44, 9, 61, 2, 30]])


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return {name: tensor * 0.2 for name, tensor in random_tensors(CONFIG).items()}


@pytest.fixture(scope="module")
def path(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tensors, shards=3)


def test_the_weights_of_the_files_compute(path: Path, tensors: dict[str, Tensor]) -> None:
    expected = build(CONFIG, lambda name: tensors[name].double(), backend="cpu", dtype="float64")(TOKENS)
    assert torch.equal(glm5_port.load(path, dtype="float64")(TOKENS), expected)
    assert expected.std() > 1e-3


def test_defaults(path: Path) -> None:
    model = glm5_port.load(path)
    assert (model.dtype, model.cache_format, model.block_size, model.max_context) == (torch.bfloat16, "plain", 64, 512)
    assert model.backend in {"cpu", "cuda", "npu"}
    assert model.mtp is None
    assert model.config.latent_norm_eps == CONFIG.rms_norm_eps
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.stop_ids == (90, 91)
    kinds = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds.pop("correction_bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ({"dtype": "float32"}, {"dtype": torch.float32}),
        ({"dtype": torch.float16}, {"dtype": torch.float16}),
        ({"backend": "cpu"}, {"backend": "cpu", "device": torch.device("cpu")}),
        ({"backend": "npu,cpu"}, {"backend": "cpu"}),
        ({"block_size": 128}, {"block_size": 128}),
        ({"max_context": 100}, {"max_context": 100, "dense_attention": False}),
        ({"max_context": 4}, {"max_context": 4, "dense_attention": True}),
        ({"cache_format": "plain"}, {"cache_format": "plain"}),
        ({"trainable": True}, {"trainable": True}),
        ({"implementation": "reference"}, {}),
    ],
)
def test_options(path: Path, options: dict[str, Any], attributes: dict[str, Any]) -> None:
    model = glm5_port.load(path, **options)
    for name, value in attributes.items():
        assert getattr(model, name) == value
    assert model(TOKENS[:, :4]).dtype == model.dtype
    if "implementation" in options:
        assert {s.chosen.id for s in model.decisions() if s.chosen} == {"reference"}


def test_latent_norm_eps(path: Path) -> None:
    engines, other = glm5_port.load(path, dtype="float64"), glm5_port.load(path, dtype="float64", latent_norm_eps=1e-2)
    assert (engines.config.latent_norm_eps, other.config.latent_norm_eps) == (1e-5, 1e-2)
    assert not torch.equal(engines(TOKENS), other(TOKENS))


def test_mtp(path: Path) -> None:
    model = glm5_port.load(path, mtp=True, dtype="float64")
    assert model.mtp is not None
    generated = model.generate(TOKENS, max_new_tokens=6, stop_ids=(), draft_tokens=2)
    assert torch.equal(generated, glm5_port.load(path, dtype="float64").generate(TOKENS, max_new_tokens=6, stop_ids=()))
    assert model.speculation.drafted > 0


def test_trainable(path: Path) -> None:
    model = glm5_port.load(path, dtype="float32", trainable=True)
    model(TOKENS).square().sum().backward()
    assert model.embedding is not None
    assert model.embedding.grad is not None
    frozen = glm5_port.load(path, dtype="float32")
    frozen.embedding.requires_grad_()
    with pytest.raises(GradientError, match="trainable=True"):
        frozen(TOKENS)


def test_progress_is_told_after_each_tensor(path: Path) -> None:
    told: list[tuple[int, int]] = []
    glm5_port.load(path, progress=lambda done, total: told.append((done, total)))
    total = len(expected_tensors(CONFIG, mtp=False))
    assert told == [(done, total) for done in range(1, total + 1)]
    told.clear()
    glm5_port.load(path, mtp=True, progress=lambda done, total: told.append((done, total)))
    with_mtp = len(expected_tensors(CONFIG, mtp=True))
    assert told[-1] == (with_mtp, with_mtp)
    assert with_mtp > total


def test_stop_ids_of_generation_config(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, tensors)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    model = glm5_port.load(tmp_path, dtype="float64")
    assert model.stop_ids == (7, 8)
    free = model.generate(TOKENS, max_new_tokens=5, stop_ids=())[0].tolist()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": free[10]}))
    model = glm5_port.load(tmp_path, dtype="float64")
    assert model.stop_ids == (free[10],)
    stopped = model.generate(TOKENS, max_new_tokens=5)[0].tolist()
    assert stopped == free[: free.index(free[10], 9) + 1]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dtype": "bfloat6"},
            InputError,
            r"dtype=bfloat6: no such working dtype; did you mean bfloat16\?\n  supported: bfloat16, float16",
        ),
        ({"dtype": torch.int8}, InputError, "dtype=int8: no such working dtype"),
        ({"latent_norm_eps": -1e-5}, InputError, "latent_norm_eps must be a positive number, got -1e-05"),
        ({"block_size": -1}, InputError, "block_size must be at least 1"),
        ({"max_context": 513}, InputError, r"max_context=513 is outside 1\.\.512"),
        ({"cache_format": "fp8"}, InputError, "cache_format='fp8' .latent cache.: the 656-byte row holds"),
        ({"cache_format": "bf16"}, InputError, "cache_format='bf16': no such layout"),
        ({"backend": "cpx"}, FlagError, r"backend=cpx: no such backend; did you mean cpu\?"),
        ({"backend": "reference"}, FlagError, "is not a chip"),
    ],
)
def test_wrong_options(
    path: Path, options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glm5_port.model.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(error, match=message):
        glm5_port.load(path, **options)


def test_a_backend_that_is_not_here(path: Path, chip: Any) -> None:
    """The error says why, and what is usable instead. (`npu` may be here; a chip of the test is not.)"""
    chip("elsewhere", missing="the package torch_elsewhere is not installed")
    with pytest.raises(SelectionError) as caught:
        glm5_port.load(path, backend="elsewhere")
    text = str(caught.value)
    assert text.startswith(
        "backend=elsewhere: no requested backend is usable on this machine\n  elsewhere: the package torch_elsewhere"
    )
    assert "usable here: " in text
    assert "cpu" in text.split("usable here: ")[1]
    assert glm5_port.load(path, backend="elsewhere,cpu").backend == "cpu"


@pytest.mark.skipif(bool(getattr(torch, "npu", None)), reason="an NPU is here")
def test_npu_is_missing_here(path: Path) -> None:
    with pytest.raises(SelectionError, match=r"backend=npu: no requested backend .*\n  npu: .*\n  usable here: .*cpu"):
        glm5_port.load(path, backend="npu")


def test_the_flag_decides_without_an_argument(path: Path, set_flags: Any, chip: Any) -> None:
    chip("elsewhere", missing="nothing is there")
    set_flags(GLM5_PORT_BACKEND="elsewhere")
    with pytest.raises(SelectionError, match="GLM5_PORT_BACKEND=elsewhere: no requested backend"):
        glm5_port.load(path)
    assert glm5_port.load(path, backend="cpu").backend == "cpu"


def test_a_checkpoint_without_mtp(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.4.")}
    write(tmp_path / "announced", trunk)
    assert glm5_port.load(tmp_path / "announced").mtp is None
    with pytest.raises(CheckpointError, match="missing"):
        glm5_port.load(tmp_path / "announced", mtp=True)
    write(tmp_path / "none", trunk, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 0"):
        glm5_port.load(tmp_path / "none", mtp=True)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        glm5_port.load(tmp_path / "nowhere")
