"""Counts and bytes against published numbers: the checkpoint totals equal those of the released index files to the byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8
from glm5_port.errors import InputError
from glm5_port.model import accounting
from tests.model import checkpoint_files as files
from tests.test_config import GLM_5, GLM_5_2

V5 = Glm5Config.from_dict(GLM_5)
V52 = Glm5Config.from_dict(GLM_5_2)
FP8 = BlockFp8((128, 128), ("lm_head", "self_attn.indexer.weights_proj"))


@pytest.mark.parametrize(
    ("config", "trunk", "with_mtp", "active", "indexers"),
    [
        (V5, 743_911_199_232, 753_864_119_552, 40_833_146_112, 731_008_512),
        (V52, 743_377_000_704, 753_329_921_024, 40_298_947_584, 196_809_984),
    ],
)
def test_parameters(config: Glm5Config, trunk: int, with_mtp: int, active: int, indexers: int) -> None:
    counted = accounting.count_parameters(config)
    assert counted.components == {
        "embedding": 951_582_720,
        "LM head": 951_582_720,
        "attention": 12_871_732_224,
        "indexers": indexers,
        "norms": 964_608,
        "dense MLP": 679_477_248,
        "routed experts": 724_775_731_200,
        "shared experts": 2_831_155_200,
        "routers": 117_964_800,
    }
    assert (counted.trunk, counted.mtp, counted.total) == (trunk, 9_952_920_320, with_mtp)
    assert counted.correction_biases == 19_200
    assert accounting.active_parameters(config) == active


def test_parameters_without_an_mtp_layer() -> None:
    counted = accounting.count_parameters(dataclasses.replace(V5, num_nextn_predict_layers=0))
    assert (counted.mtp, counted.total) == (0, 743_911_199_232)


def test_parameters_are_those_of_the_class_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**GLM_5_2))
    assert model.num_parameters() == accounting.count_parameters(V52).trunk


@pytest.mark.parametrize(
    ("config", "tensors", "size"),
    [
        (V5, 59_870, 1_507_728_316_928),
        (V52, 59_585, 1_506_659_919_872),
        (dataclasses.replace(V5, quantization=FP8), 119_028, 756_162_687_872),
        (dataclasses.replace(V52, quantization=FP8), 118_629, 755_617_140_416),
    ],
)
def test_checkpoint_storage(config: Glm5Config, tensors: int, size: int) -> None:
    assert accounting.checkpoint_storage(config) == accounting.Storage(tensors, size)


@pytest.mark.parametrize("quantize", [False, True])
def test_storage_is_what_a_written_checkpoint_takes(tmp_path: Path, quantize: bool) -> None:
    config = Glm5Config.from_dict({**files.SMALL, **({"quantization_config": files.FP8} if quantize else {})})
    tensors = files.random_tensors(config)
    stored = files.quantized(tensors, config) if quantize else tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert accounting.checkpoint_storage(config) == accounting.Storage(len(stored), size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_bytes(dtype: torch.dtype) -> None:
    parameters = accounting.count_parameters(V5)
    assert accounting.weight_bytes(V5, dtype) == parameters.trunk * dtype.itemsize + 19_200 * 4
    assert accounting.weight_bytes(V5, dtype, mtp=True) == parameters.total * dtype.itemsize + 19_456 * 4


# Bytes a token, latent of 78 layers and index keys of the owning layers (78 and 21).
@pytest.mark.parametrize(
    ("latent", "index", "latent_bytes", "index_bytes"),
    [
        ("plain", None, 1152, 256),
        ("plain", "fp8", 1152, 132),
        ("fp8", None, 656, 132),
        ("int8", None, 656, 130),
    ],
)
@pytest.mark.parametrize(("config", "owners"), [(V5, 78), (V52, 21)])
def test_cache_bytes(
    config: Glm5Config, owners: int, latent: str, index: str | None, latent_bytes: int, index_bytes: int
) -> None:
    found = accounting.cache_bytes_per_token(config, torch.bfloat16, latent, index)
    assert (found.latent, found.index) == (78 * latent_bytes, owners * index_bytes)
    with_mtp = accounting.cache_bytes_per_token(config, torch.bfloat16, latent, index, mtp=True)
    assert with_mtp.total - found.total == latent_bytes + index_bytes


def test_cache_totals_in_kib() -> None:
    def kib(config: Glm5Config, *formats: str) -> float:
        return round(accounting.cache_bytes_per_token(config, torch.bfloat16, *formats).total / 1024, 2)

    assert (kib(V5, "plain"), kib(V52, "plain")) == (107.25, 93.00)
    assert (kib(V5, "plain", "fp8"), kib(V52, "plain", "fp8")) == (97.80, 90.46)
    assert (kib(V5, "fp8"), kib(V52, "fp8")) == (60.02, 52.68)


def test_memory_need() -> None:
    need = accounting.memory_need(V52, context=1_048_576)
    assert need.weights == 743_377_000_704 * 2 + 19_200 * 4
    assert need.cache == 1_048_576 * (78 * 1152 + 21 * 256)
    assert need.total == need.weights + need.cache
    # Pages are whole: 65 tokens take two pages of 64, for each of three sequences.
    assert accounting.memory_need(V5, 65, batch=3).cache == 3 * 128 * 78 * (1152 + 256)
    assert accounting.memory_need(V5, 65, block_size=128, cache_format="fp8").cache == 128 * 78 * (656 + 132)


def test_formats_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(InputError, match="no such layout"):
        accounting.cache_bytes_per_token(V5, torch.bfloat16, "fp4")
    with pytest.raises(InputError, match="656-byte row"):
        accounting.cache_bytes_per_token(Glm5Config.from_dict(files.SMALL), torch.bfloat16, "fp8")
