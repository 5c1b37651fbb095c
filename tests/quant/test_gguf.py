"""GGUF: read back by gguf-py, every tensor against the source's. That llama.cpp computes the same is not tested here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant.export import export
from glm5_port.quant.formats.gguf import PRE_TOKENIZER, export_gguf
from glm5_port.quant.gguf_file import GgufTensor, write_gguf
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from tests.quant import exports


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    export(exports.write_source(root / "source"), root / "int4", exports.SMALL_SHARDS)
    return root / "int4"


@pytest.fixture(scope="module")
def reader(canonical: Path) -> gguf.GGUFReader:
    path = canonical.parent / "model.gguf"
    size = export_gguf(canonical, path)
    assert path.stat().st_size == size
    return gguf.GGUFReader(path)


def values(reader: gguf.GGUFReader) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> kind, values in float32 with the outermost dimension first."""
    found = {}
    for tensor in reader.tensors:
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type.name, decoded.reshape([int(n) for n in tensor.shape[::-1]]))
    return found


def field(reader: gguf.GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    assert found is not None, name
    return found.contents()


# -- tensors -------------------------------------------------------------------------------------------------------------


def test_experts_are_stacked_and_exact(canonical: Path, reader: gguf.GGUFReader) -> None:
    stored, written = exports.read_all(canonical), values(reader)
    for layer in (1, 2, 3, 4):
        for projection in ("gate", "up", "down"):
            kind, stacked = written[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert kind == "Q4_0"
            for expert in range(4):
                name = exports.expert(layer, expert, projection)
                codes, scales = unpack_int4(stored[f"{name}_packed"]), stored[f"{name}_scale"].float()
                exact = codes.float().unflatten(-1, (-1, 32)) * scales.unsqueeze(-1)
                assert np.array_equal(stacked[expert], exact.flatten(-2).numpy()), name


def test_every_other_tensor_keeps_its_values(canonical: Path, reader: gguf.GGUFReader) -> None:
    stored, written = exports.read_all(canonical), values(reader)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, 5)
    others = {n: t for n, t in stored.items() if ".experts." not in n}
    count = 0
    for name, tensor in others.items():
        if name.endswith("kv_b_proj.weight"):
            heads = tensor.view(2, 12 + 10, 16).float()
            block = f"blk.{name.split('.')[2]}."
            assert np.array_equal(written[f"{block}attn_k_b.weight"][1], heads[:, :12].transpose(1, 2).numpy())
            assert np.array_equal(written[f"{block}attn_v_b.weight"][1], heads[:, 12:].numpy())
            count += 2
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("e_score_correction_bias"):
            theirs = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        assert theirs is not None, name
        kind, shown = written[theirs]
        assert np.array_equal(shown, tensor.float().numpy()), name
        wide = tensor.dim() == 1 or name.endswith("mlp.gate.weight")
        assert kind == ("F32" if wide else {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype])
        count += 1
    assert len(written) == count + 4 * 3


def test_tensors_are_those_that_the_architecture_has(reader: gguf.GGUFReader) -> None:
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GLM_DSA]}
    for tensor in reader.tensors:
        parts = tensor.name.rsplit(".", 1)[0].split(".")
        plain = ".".join(["blk", "{bid}", *parts[2:]]) if parts[0] == "blk" else ".".join(parts)
        assert plain in known, tensor.name
        assert tensor.data_offset % 32 == 0


def test_an_mtp_layer_that_is_not_quantised_stays_bf16(tmp_path: Path) -> None:
    source = exports.write_source(tmp_path / "source")
    export(source, tmp_path / "int4", Options(mtp="bf16"))
    export_gguf(tmp_path / "int4", tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.4.ffn_up_exps.weight"] == "BF16"
    assert kinds["blk.3.ffn_up_exps.weight"] == "Q4_0"


# -- metadata ------------------------------------------------------------------------------------------------------------


def test_metadata(reader: gguf.GGUFReader) -> None:
    assert field(reader, "general.architecture") == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GLM_DSA]
    keys = gguf.Keys
    expected = {
        keys.LLM.BLOCK_COUNT: 5,
        keys.LLM.NEXTN_PREDICT_LAYERS: 1,
        keys.LLM.EMBEDDING_LENGTH: 64,
        keys.LLM.EXPERT_FEED_FORWARD_LENGTH: 96,
        keys.LLM.EXPERT_COUNT: 4,
        keys.LLM.EXPERT_USED_COUNT: 2,
        keys.LLM.LEADING_DENSE_BLOCK_COUNT: 1,
        keys.LLM.EXPERT_WEIGHTS_SCALE: 2.5,
        keys.LLM.EXPERT_WEIGHTS_NORM: True,
        keys.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
        keys.Attention.HEAD_COUNT: 2,
        keys.Attention.HEAD_COUNT_KV: 1,
        keys.Attention.Q_LORA_RANK: 24,
        keys.Attention.KV_LORA_RANK: 16,
        keys.Attention.KEY_LENGTH: 24,
        keys.Attention.VALUE_LENGTH: 16,
        keys.Attention.KEY_LENGTH_MLA: 20,
        keys.Attention.VALUE_LENGTH_MLA: 10,
        keys.Attention.Indexer.HEAD_COUNT: 16,
        keys.Attention.Indexer.KEY_LENGTH: 16,
        keys.Attention.Indexer.TOP_K: 4,
        keys.Rope.DIMENSION_COUNT: 8,
        keys.Rope.FREQ_BASE: 8e6,
    }
    for key, value in expected.items():
        assert field(reader, key.format(arch="glm-dsa")) == pytest.approx(value), key
    assert field(reader, "glm-dsa.attention.indexer.types") == [True, True, False, False]
    assert field(reader, "glm-dsa.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert field(reader, "tokenizer.ggml.model") == "none"


def test_a_bpe_tokenizer_is_carried(canonical: Path, tmp_path: Path) -> None:
    described = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "added_tokens": [
            {"id": 90, "content": "<|endoftext|>", "special": True},
            {"id": 91, "content": "<|user|>", "special": True},
            {"id": 92, "content": "<think>", "special": False},
        ],
    }
    for file in canonical.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    export_gguf(tmp_path, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert (len(tokens), tokens[:4], tokens[90]) == (96, ["a", "b", "ab", "[PAD3]"], "<|endoftext|>")
    assert (kinds[0], kinds[3], kinds[90], kinds[92]) == (1, 5, 3, 4)
    assert field(reader, "tokenizer.ggml.merges") == ["a b"]
    assert field(reader, "tokenizer.ggml.pre") == PRE_TOKENIZER
    assert (field(reader, "tokenizer.ggml.eos_token_id"), field(reader, "tokenizer.ggml.eot_token_id")) == (90, 91)


# -- refusals ------------------------------------------------------------------------------------------------------------


def damaged(canonical: Path, copy: Path, edit: Any) -> Path:
    copy.mkdir()
    for file in canonical.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    exports.change(copy, edit)
    return copy


def test_scales_that_float16_cannot_hold_are_listed_and_nothing_is_left(canonical: Path, tmp_path: Path) -> None:
    name = exports.expert(2, 1, "up")

    def shrink(tensors: dict[str, Tensor]) -> None:
        if f"{name}_scale" in tensors:
            tensors[f"{name}_scale"][3, 1] = 2.0**-30

    broken = damaged(canonical, tmp_path / "broken", shrink)
    with pytest.raises(InputError, match=rf"{name}.*\[3, 1\]|\[3, 1\]") as error:
        export_gguf(broken, tmp_path / "m.gguf")
    assert name in str(error.value)
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_checkpoint_that_is_not_whole(canonical: Path, tmp_path: Path) -> None:
    name = exports.expert(2, 1, "up")
    broken = damaged(canonical, tmp_path / "broken", lambda tensors: tensors.pop(f"{name}_scale", None))
    with pytest.raises(CheckpointError, match="cannot be written as GGUF"):
        export_gguf(broken, tmp_path / "m.gguf")


def test_other_groups_and_plain_checkpoints_are_refused(tmp_path: Path) -> None:
    source = exports.write_source(tmp_path / "source")
    with pytest.raises(InputError, match="no INT4 experts"):
        export_gguf(source, tmp_path / "m.gguf")
    export(source, tmp_path / "int4", Options(rule=Int4Rule("amax7", 16)))
    with pytest.raises(InputError, match="groups of 16; a block of Q4_0 has 32"):
        export_gguf(tmp_path / "int4", tmp_path / "m.gguf")


def test_a_tensor_of_the_wrong_size_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"earlier")
    with pytest.raises(CheckpointError, match="2 bytes instead of 8"):
        write_gguf(path, {}, [GgufTensor("x", "F32", (2,), lambda: [memoryview(b"ab")])])
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
