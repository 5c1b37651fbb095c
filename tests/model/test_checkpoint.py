"""Checkpoints: what fits is read exactly, and every fault is refused with the names of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8
from glm5_port.errors import CheckpointError, ConfigError
from glm5_port.model import checkpoint as checkpoint_module
from glm5_port.model.checkpoint import Checkpoint
from glm5_port.model.checkpoint_check import kept_in_float
from glm5_port.model.tensors import expected_tensors
from tests.model import checkpoint_files as files

CONFIG = Glm5Config.from_dict(files.SMALL)
FIRST_SHARD = "model-00001-of-00003.safetensors"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NORM = "model.norm.weight"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return files.random_tensors(CONFIG)


def refused(directory: Path, *, mtp: bool = False) -> str:
    """The text of the one error that opening and checking raises."""
    with pytest.raises(CheckpointError) as caught, Checkpoint.open(directory) as checkpoint:
        checkpoint.check(expected_tensors(checkpoint.config, mtp=mtp))
    return str(caught.value)


def accepted(directory: Path, *, mtp: bool = False) -> Checkpoint:
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(expected_tensors(checkpoint.config, mtp=mtp))
    return checkpoint


# --- what fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mtp", [False, True])
def test_reads_every_tensor_exactly(tmp_path: Path, tensors: dict[str, Tensor], shards: int, mtp: bool) -> None:
    checkpoint = accepted(files.write(tmp_path, tensors, shards=shards), mtp=mtp)
    assert checkpoint.has_mtp
    assert len(checkpoint.stored.files) == shards
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name, tensor.dtype), tensor), name
        assert torch.equal(checkpoint.tensor(name, torch.float64), tensor.double()), name


def test_names_and_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {key: value for key, value in files.SMALL.items() if key not in ("architectures", "model_type", "dtype")}
    model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**{**fields, "num_nextn_predict_layers": 0}))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    checkpoint = accepted(tmp_path)
    saved = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = expected_tensors(checkpoint.config, mtp=False)
    assert {name: spec.shape for name, spec in expected.items()} == {name: tuple(t.shape) for name, t in saved.items()}
    gate_up = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2]
    parts = [checkpoint.tensor(f"model.layers.1.mlp.experts.2.{part}_proj.weight", torch.float32) for part in ("gate", "up")]
    assert torch.equal(torch.cat(parts), gate_up)


def test_without_mtp_tensors_the_trunk_is_whole_and_the_mtp_layer_is_missing(tmp_path: Path) -> None:
    files.write(tmp_path, files.random_tensors(CONFIG, mtp=False))
    assert not accepted(tmp_path).has_mtp
    text = refused(tmp_path, mtp=True)
    assert "missing (35):" in text
    assert "model.layers.4.input_layernorm.weight" in text


def test_an_mtp_layer_that_the_config_does_not_announce_is_unexpected(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files.write(tmp_path, tensors, num_nextn_predict_layers=0)
    text = refused(tmp_path)
    assert "unexpected (" in text
    assert "model.layers.4.eh_proj.weight" in text
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        expected_tensors(Checkpoint.open(tmp_path).config, mtp=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    accepted(files.write(tmp_path, files.random_tensors(CONFIG, dtype=dtype)))


def test_iterate_streams_in_order_and_tells_progress(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = accepted(files.write(tmp_path, tensors, shards=2))
    told: list[tuple[int, int]] = []
    names = [Q_A, BIAS, NORM]
    read = list(checkpoint.iterate(names, torch.float32, lambda done, total: told.append((done, total))))
    assert [name for name, _ in read] == names
    assert told == [(1536, 1616), (1552, 1616), (1616, 1616)]


def test_a_tensor_outlives_its_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = accepted(files.write(tmp_path, tensors))
    read = checkpoint.tensor(Q_A, torch.bfloat16)
    checkpoint.close()
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(read, tensors[Q_A])


def test_stop_ids_come_from_the_generation_config(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files.write(tmp_path, tensors)
    assert Checkpoint.open(tmp_path).stop_ids is None
    for ids, stops in ((7, (7,)), ([7, 8], (7, 8))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert Checkpoint.open(tmp_path).stop_ids == stops
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Checkpoint.open(tmp_path)


# --- tensors that do not fit ----------------------------------------------------------------------------------------------


def test_all_differences_are_told_at_once(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    del tensors[Q_A]
    tensors["model.layers.0.self_attn.q_a_proj.bias"] = torch.zeros(24)
    tensors[NORM] = tensors[NORM][:-1].contiguous()
    tensors[BIAS] = tensors[BIAS].bfloat16()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    text = refused(files.write(tmp_path, tensors))
    for part in (
        f"missing (1):\n    {Q_A}\n",
        "unexpected (1):\n    model.layers.0.self_attn.q_a_proj.bias\n",
        f"wrong shape (1):\n    {NORM}: expected [32], got [31]\n",
        f"wrong dtype (2):\n    {BIAS}: expected F32, got BF16",
        "lm_head.weight: expected BF16, F16, F32 or block-FP8, got I8",
    ):
        assert part in text


def test_similar_names_are_counted_not_listed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name or name.startswith("model.layers.4.")}
    text = refused(files.write(tmp_path, kept))
    assert "missing (36):" in text
    assert "12 x model.layers.*.mlp.experts.*.gate_proj.weight (from model.layers.1.mlp.experts.0.gate_proj.weight" in text
    assert len(text.splitlines()) < 10


def test_many_sorts_of_names_are_cut_short(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    strangers = {f"stranger_{chr(97 + i)}": torch.zeros(1) for i in range(14)}
    text = refused(files.write(tmp_path, tensors | strangers))
    assert "unexpected (14):" in text
    assert "and 4 more" in text


def test_an_indexer_on_a_shared_layer_is_unexpected(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.2.self_attn.indexer.wk.weight"
    assert name in refused(files.write(tmp_path, tensors | {name: torch.zeros(16, 32)}))


def test_a_layer_beyond_the_model_is_unexpected(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.7.input_layernorm.weight"
    assert f"unexpected (1):\n    {name}" in refused(files.write(tmp_path, tensors | {name: torch.zeros(32)}))


def test_reading_an_unknown_name_suggests_the_nearest(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = accepted(files.write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"did you mean model\.norm\.weight\?"):
        checkpoint.tensor("model.norm.wieght", torch.float32)


# --- files that do not fit ------------------------------------------------------------------------------------------------


def _cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


FILE_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, FIRST_SHARD + ": missing (the index places"),
    "truncated": (lambda file: _cut(file, file.stat().st_size - 1), FIRST_SHARD + " is truncated"),
    "truncated header": (lambda file: _cut(file, 100), "truncated inside its header"),
    "empty": (lambda file: _cut(file, 0), "not a safetensors file (0 bytes)"),
    "too long": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is longer than it should be"),
    "no header": (lambda file: file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json" * 4), "unreadable header"),
    "something else": (lambda file: file.write_bytes(b"PK\x03\x04" * 100), "not a safetensors file (400 bytes)"),
    "git lfs": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_broken_shard_is_named(tmp_path: Path, tensors: dict[str, Tensor], fault: str) -> None:
    files.write(tmp_path, tensors, shards=3)
    damage, words = FILE_FAULTS[fault]
    damage(tmp_path / FIRST_SHARD)
    text = refused(tmp_path)
    assert words in text
    assert FIRST_SHARD in text
    assert "\n  missing (" not in text, "the tensors of a broken file are told by the file, not one by one"


def test_a_truncated_single_file_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files.write(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    _cut(file, file.stat().st_size // 2)
    assert "model.safetensors is truncated" in refused(tmp_path)


def test_reading_from_a_truncated_file_is_a_checkpoint_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files.write(tmp_path, tensors)
    _cut(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"cannot read {Q_A}"):
        Checkpoint.open(tmp_path).tensor(Q_A, torch.float32)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    placed = read = files.read_index(files.write(tmp_path, tensors, shards=3))
    name = next(name for name in read if placed[name] != FIRST_SHARD)
    files.write_index(tmp_path, {**placed, name: FIRST_SHARD})
    assert f"{FIRST_SHARD} lacks 1 tensors that model.safetensors.index.json places in it, for example {name}" in refused(
        tmp_path
    )


def test_an_index_that_omits_a_tensor(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    placed = files.read_index(files.write(tmp_path, tensors, shards=3))
    del placed[NORM]
    files.write_index(tmp_path, placed)
    assert f"does not list 1 tensors that the shards hold, for example {NORM}" in refused(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    placed = files.read_index(files.write(tmp_path, tensors, shards=3))
    other = next(file for file in sorted(set(placed.values())) if file != placed[NORM])
    save_file(load_file(tmp_path / other) | {NORM: tensors[NORM]}, tmp_path / other)
    assert f"{NORM} is stored twice" in refused(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index(tmp_path: Path, tensors: dict[str, Tensor], content: str) -> None:
    files.write(tmp_path, tensors, shards=3)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(tmp_path)


def test_directories_without_weights_or_with_two_sets(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot read"):
        Checkpoint.open(tmp_path)
    files.write(tmp_path, tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no weights\n.*found pytorch_model\.bin, which is not read"):
        Checkpoint.open(tmp_path)
    files.write(tmp_path, tensors)
    files.write(tmp_path, tensors, shards=2)
    with pytest.raises(CheckpointError, match="remove the one that is stale"):
        Checkpoint.open(tmp_path)


# --- block-FP8 ------------------------------------------------------------------------------------------------------------

# Edges: 144 = 1 block and 16 rows, and 160 = 1 block and 32 columns.
WIDE = {"hidden_size": 160, "kv_lora_rank": 136, "q_lora_rank": 144, "quantization_config": files.FP8}
WIDE_CONFIG = Glm5Config.from_dict({**files.SMALL, **WIDE})


Stored = tuple[Path, dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture
def fp8(tmp_path: Path) -> Stored:
    """(directory, the bf16 tensors, what is stored) of a block-FP8 checkpoint with partial blocks at both edges."""
    original = files.random_tensors(WIDE_CONFIG)
    stored = files.quantized(original, WIDE_CONFIG)
    return files.write(tmp_path, stored, shards=2, **WIDE), original, stored


def test_block_fp8_is_multiplied_out(fp8: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, original, stored = fp8
    checkpoint = accepted(directory, mtp=True)
    assert tuple(stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape) == (2, 2)  # 144 x 160
    for budget in (checkpoint_module.READ_BYTES, 1):  # all rows at once, and one row of blocks at a time
        monkeypatch.setattr(checkpoint_module, "READ_BYTES", budget)
        for name, tensor in original.items():
            read = checkpoint.tensor(name, torch.float32)
            if name + "_scale_inv" not in stored:
                assert torch.equal(read, tensor.float()), name
                continue
            scales = stored[name + "_scale_inv"]
            for i, j in ((0, 0), (tensor.shape[0] - 1, tensor.shape[1] - 1), (tensor.shape[0] // 2, tensor.shape[1] // 3)):
                assert read[i, j] == stored[name][i, j].float() * scales[i // 128, j // 128], name
            # e4m3 keeps 3 bits after the leading one: half a step is 1/16 of the value, or of the smallest normal number.
            assert ((read - tensor.float()).abs() <= tensor.float().abs() / 16 + scales.max() * 2**-10).all(), name


def test_multipliers_multiply(fp8: Stored) -> None:
    directory, _, stored = fp8
    before = accepted(directory).tensor(Q_A, torch.float32)
    doubled = stored | {Q_A + "_scale_inv": stored[Q_A + "_scale_inv"] * 2}
    files.write(directory, doubled, shards=2, **WIDE)
    assert torch.equal(Checkpoint.open(directory).tensor(Q_A, torch.float32), before * 2)


WEIGHTS_PROJ = "model.layers.0.self_attn.indexer.weights_proj.weight"
E4M3 = torch.float8_e4m3fn
FP8_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "multipliers missing": (lambda t: t.pop(Q_A + "_scale_inv"), f"missing (1):\n    {Q_A}_scale_inv"),
    "multipliers of the wrong shape": (
        lambda t: t.update({Q_A + "_scale_inv": torch.ones(1, 2)}),
        f"wrong shape (1):\n    {Q_A}_scale_inv: expected [2, 2], got [1, 2]",
    ),
    "multipliers in bf16": (
        lambda t: t.update({Q_A + "_scale_inv": torch.ones(2, 2, dtype=torch.bfloat16)}),
        f"wrong dtype (1):\n    {Q_A}_scale_inv: expected F32, got BF16",
    ),
    "multipliers of a bf16 weight": (
        lambda t: t.update({Q_A: t[Q_A].bfloat16()}),
        f"unexpected (1):\n    {Q_A}_scale_inv: multipliers of a weight that is stored as BF16",
    ),
    "multipliers of a norm": (lambda t: t.update({NORM + "_scale_inv": torch.ones(2)}), f"unexpected (1):\n    {NORM}_scale_inv"),
    "weights_proj": (
        lambda t: t.update({WEIGHTS_PROJ: t[WEIGHTS_PROJ].to(E4M3), WEIGHTS_PROJ + "_scale_inv": torch.ones(1, 2)}),
        f"wrong dtype (1):\n    {WEIGHTS_PROJ}: stored as FP8, but block-FP8 keeps this tensor in floating point",
    ),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_faults_of_block_fp8(fp8: Stored, fault: str) -> None:
    directory, _, stored = fp8
    inject, words = FP8_FAULTS[fault]
    inject(stored)
    assert words in refused(files.write(directory, stored, shards=2, **WIDE))


def test_fp8_without_a_quantization_config(fp8: Stored) -> None:
    directory, _, stored = fp8
    files.write(directory, stored, shards=2, **{**WIDE, "quantization_config": None})
    assert "no quantization_config" in refused(directory)
    with pytest.raises(CheckpointError, match="no quantization_config"):
        Checkpoint.open(directory).tensor(Q_A, torch.float32)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("model.layers.0.self_attn.q_a_proj", True),
        ("q_a_proj", True),
        ("model.layers.0", True),
        ("self_attn.q_a_proj$", True),
        ("model.layers.00", False),
        ("q_a", False),
        ("q_a_proj.weight", False),
        ("model.layers.3", False),
    ],
)
def test_an_entry_of_modules_to_not_convert_is_whole_components(entry: str, kept: bool) -> None:
    assert kept_in_float(Q_A, BlockFp8((128, 128), (entry,))) is kept


def test_a_module_that_is_listed_as_not_converted_but_stored_as_fp8(fp8: Stored) -> None:
    directory, _, stored = fp8
    listed = {**files.FP8, "modules_to_not_convert": ["model.layers.0.self_attn.q_a_proj"]}
    files.write(directory, stored, shards=2, **{**WIDE, "quantization_config": listed})
    assert f"wrong dtype (1):\n    {Q_A}: stored as FP8, but modules_to_not_convert names it" in refused(directory)


def test_indexers_proj_means_weights_proj() -> None:
    assert WIDE_CONFIG.quantization is not None
    assert "model.layers.0.self_attn.indexer.weights_proj" in WIDE_CONFIG.quantization.not_converted


# --- memory ---------------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation inside returns, in bytes, and how many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not (args and isinstance(args[0], Tensor) and result.data_ptr() == args[0].data_ptr()):
            self.sizes.append(result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("quantize", [False, True])
def test_a_large_tensor_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: bool) -> None:
    changes = {"vocab_size": 96, "intermediate_size": 20000, "quantization_config": files.FP8 if quantize else None}
    config = Glm5Config.from_dict({**files.SMALL, **changes})
    tensors = files.random_tensors(config)
    stored = files.quantized(tensors, config) if quantize else tensors
    checkpoint = accepted(files.write(tmp_path, stored, **changes))
    budget = 256 * 1024
    monkeypatch.setattr(checkpoint_module, "READ_BYTES", budget)
    name = "model.layers.0.mlp.gate_proj.weight"
    checkpoint.tensor(name, torch.float32)  # opens the file outside of what is measured
    with _Largest() as seen:
        read = checkpoint.tensor(name, torch.float32)
    whole = read.numel() * 4
    assert whole == 20000 * 32 * 4
    sizes = sorted(seen.sizes)
    assert sizes.count(whole) == 1, "only the result is as large as the tensor"
    assert sizes[-2] <= budget
    reference = stored[name].float()
    if quantize:
        reference = reference * stored[name + "_scale_inv"].repeat_interleave(128, 0)[:20000, :1]
    assert torch.equal(read, reference)
