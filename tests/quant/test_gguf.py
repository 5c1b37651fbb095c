"""GGUF: read back by gguf-py, every tensor against the source's. That llama.cpp computes the same is not tested here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.quant import writing
from glm5_port.quant.export import export
from glm5_port.quant.formats.gguf_model import model_metadata
from glm5_port.quant.formats.gguf_tokenizer import GLM, GPT2, why_left_out
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.transcode import transcode
from glm5_port.quant.verify import verify
from glm5_port.testing.tiny import tiny_config
from tests.quant import exports

GGUF = Options(format="gguf")


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    export(exports.write_source(root / "source"), root / "int4", exports.SMALL_SHARDS)
    return root / "int4"


@pytest.fixture(scope="module")
def reader(canonical: Path) -> gguf.GGUFReader:
    made = transcode(canonical, canonical.parent / "gguf", GGUF)
    path = canonical.parent / "gguf" / "model.gguf"
    assert path.stat().st_size == made.plan.bytes
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
    export(source, tmp_path / "gguf", Options(format="gguf", mtp="bf16"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
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


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
"""A pre-tokenizer that does not cut."""


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "ignore_merges": True},
    "pre_tokenizer": split(GLM),
    "added_tokens": [
        {"id": 90, "content": "<|endoftext|>", "special": True},
        {"id": 91, "content": "<|user|>", "special": True},
        {"id": 92, "content": "<think>", "special": False},
    ],
}


def with_tokenizer(canonical: Path, directory: Path, described: dict[str, Any]) -> gguf.GGUFReader:
    source = Path(shutil.copytree(canonical, directory / "int4"))
    (source / "tokenizer.json").write_text(json.dumps(described))
    transcode(source, directory / "gguf", GGUF)
    return gguf.GGUFReader(directory / "gguf" / "model.gguf")


def test_a_bpe_tokenizer_is_carried(canonical: Path, tmp_path: Path) -> None:
    reader = with_tokenizer(canonical, tmp_path, TOKENIZER)
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert (len(tokens), tokens[:4], tokens[90]) == (96, ["a", "b", "ab", "[PAD3]"], "<|endoftext|>")
    assert (kinds[0], kinds[3], kinds[90], kinds[92]) == (1, 5, 3, 4)
    assert field(reader, "tokenizer.ggml.merges") == ["a b"]
    assert field(reader, "tokenizer.ggml.pre") == "glm4"
    assert (field(reader, "tokenizer.ggml.eos_token_id"), field(reader, "tokenizer.ggml.eot_token_id")) == (90, 91)
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.chat_template") == (canonical / "chat_template.jinja").read_text()


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_left_out(canonical: Path, tmp_path: Path) -> None:
    reader = with_tokenizer(canonical, tmp_path, {**TOKENIZER, "pre_tokenizer": split(r"\w+")})
    assert field(reader, "tokenizer.ggml.model") == "none"
    assert reader.get_field("tokenizer.ggml.tokens") is None


def test_merges_may_be_none(canonical: Path, tmp_path: Path) -> None:
    """llama.cpp wants the merges of a byte tokenizer as an empty array of strings, and refuses one of numbers."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    reader = with_tokenizer(canonical, tmp_path, {"model": model, "pre_tokenizer": BYTES})
    merges = reader.fields["tokenizer.ggml.merges"]
    assert merges.contents() == []
    assert int.from_bytes(merges.parts[3].tobytes(), "little") == gguf.GGUFValueType.STRING


CUTS = [
    ("glm", {}, "glm4"),
    ("glm_merging_whole_pieces", {"model": {**TOKENIZER["model"], "ignore_merges": False}}, "chatglm-bpe"),
    ("gpt2", {"model": {**TOKENIZER["model"], "ignore_merges": False}, "pre_tokenizer": {**BYTES, "use_regex": True}}, "gpt-2"),
    ("gpt2_as_a_split", {"model": {**TOKENIZER["model"], "ignore_merges": False}, "pre_tokenizer": split(GPT2)}, "gpt-2"),
    ("bytes", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": BYTES}, "chatglm-bpe"),
]


@pytest.mark.parametrize(("changes", "name"), [c[1:] for c in CUTS], ids=[c[0] for c in CUTS])
def test_how_text_is_cut_has_llama_cpps_name(changes: dict[str, Any], name: str, canonical: Path, tmp_path: Path) -> None:
    assert field(with_tokenizer(canonical, tmp_path, {**TOKENIZER, **changes}), "tokenizer.ggml.pre") == name


LEFT_OUT: list[tuple[str, dict[str, Any], str]] = [
    ("no_cut", {"pre_tokenizer": BYTES}, "cuts text"),
    ("no_pre_tokenizer", {"pre_tokenizer": None}, "cuts text"),
    ("another_pattern", {"pre_tokenizer": split(r"\w+")}, "cuts text"),
    ("another_behaviour", {"pre_tokenizer": split(GLM, behavior="Removed")}, "cuts text"),
    (
        "cut_twice",
        {"pre_tokenizer": {**split(GLM), "pretokenizers": [split(GLM)["pretokenizers"][0]] * 2 + [BYTES]}},
        "cuts text",
    ),
    ("a_space_before", {"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}}, "cuts text"),
    ("gpt2_taking_whole_pieces", {"pre_tokenizer": {**BYTES, "use_regex": True}}, "cuts text"),
    ("normalised", {"normalizer": {"type": "NFC"}}, "normalises"),
    ("framed", {"post_processor": {"type": "TemplateProcessing"}}, "around a text"),
    ("stripping", {"added_tokens": [{"id": 3, "content": "<x>", "lstrip": True}]}, "take spaces"),
    ("byte_fallback", {"model": {**TOKENIZER["model"], "byte_fallback": True}}, "byte_fallback"),
    ("unigram", {"model": {"type": "Unigram"}}, "not BPE but 'Unigram'"),
    ("something_else", {"model": None}, "describes no tokenizer"),
]


@pytest.mark.parametrize(("changes", "reason"), [c[1:] for c in LEFT_OUT], ids=[c[0] for c in LEFT_OUT])
def test_why_a_tokenizer_is_left_out(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert "there is no tokenizer.json" in str(why_left_out(path))
    path.write_text(json.dumps(TOKENIZER))
    assert why_left_out(path) is None
    path.write_text(json.dumps({**TOKENIZER, **changes}))
    assert reason in str(why_left_out(path))


def test_groups_of_experts_that_leave_none_out_are_one_group() -> None:
    """llama.cpp wants fewer groups used than there are."""
    for kept, written in ((4, (1, 1)), (2, (4, 2))):
        fields = model_metadata(tiny_config(n_group=4, topk_group=kept), "x", mtp=False)
        assert (fields["glm-dsa.expert_group_count"], fields["glm-dsa.expert_group_used_count"]) == written


# -- parts and refusals --------------------------------------------------------------------------------------------------


def test_parts_say_what_llama_cpp_counts_and_hold_the_same_tensors(
    canonical: Path, reader: gguf.GGUFReader, tmp_path: Path
) -> None:
    plan = transcode(canonical, tmp_path / "parts", replace(GGUF, max_shard_bytes=100_000)).plan
    count = len(plan.shards)
    assert count == 6
    whole, found = values(reader), {}
    for number in range(count):
        part = gguf.GGUFReader(tmp_path / "parts" / f"model-{number + 1:05}-of-{count:05}.gguf")
        assert [field(part, f"split.{key}") for key in ("no", "count", "tensors.count")] == [number, count, len(whole)]
        kinds = [part.fields[f"split.{key}"].types for key in ("no", "count", "tensors.count")]
        assert kinds == [[gguf.GGUFValueType.UINT16], [gguf.GGUFValueType.UINT16], [gguf.GGUFValueType.INT32]]
        assert (part.get_field("general.architecture") is not None) == (number == 0)
        assert not set(found) & set(values(part))
        found |= values(part)
    assert set(found) == set(whole)
    assert all(found[name][0] == kind and np.array_equal(found[name][1], shown) for name, (kind, shown) in whole.items())


def test_from_the_original_as_from_int4_and_with_any_number_of_workers(canonical: Path, tmp_path: Path) -> None:
    parts = replace(GGUF, max_shard_bytes=100_000)
    transcode(canonical, tmp_path / "int4", parts)
    export(canonical.parent / "source", tmp_path / "one", parts)
    export(canonical.parent / "source", tmp_path / "three", parts, workers=3)
    from_int4, one, three = (exports.digests(tmp_path / name) for name in ("int4", "one", "three"))
    assert one == three
    assert {name for name, digest in one.items() if from_int4.get(name) != digest} == {
        "int4_manifest.json",  # another source
        "int4_report.json",  # nothing is quantised in transcoding
        "int4_report.txt",
    }


def test_a_block_fp8_source(tmp_path: Path) -> None:
    source = exports.write_source(tmp_path / "source", fp8=True)
    export(source, tmp_path / "int4")
    export(source, tmp_path / "gguf", GGUF)
    assert verify(tmp_path / "gguf", source).problems == []
    assert verify(tmp_path / "gguf", tmp_path / "int4").problems == []


def test_scales_that_float16_cannot_hold_are_listed(canonical: Path, tmp_path: Path) -> None:
    name, broken = exports.expert(2, 1, "up"), Path(shutil.copytree(canonical, tmp_path / "broken"))

    def shrink(tensors: dict[str, Tensor]) -> None:
        if f"{name}_scale" in tensors:
            tensors[f"{name}_scale"][3, 1] = 2.0**-30

    exports.change(broken, shrink)
    with pytest.raises(InputError, match=rf"{name}: 1 of 192 scales are not exact in float16: scale \[row, group\] \[3, 1\]"):
        transcode(broken, tmp_path / "gguf", GGUF)
    assert not list((tmp_path / "gguf").glob("*.gguf*"))
    source = Path(shutil.copytree(canonical.parent / "source", tmp_path / "small"))
    exports.change(source, lambda tensors: [t[40:].mul_(1e-7) for n, t in tensors.items() if n == name])
    with pytest.raises(InputError, match=rf"{name}: .* \[40, 0\]"):
        export(source, tmp_path / "from_source", GGUF)


def test_the_row_of_such_a_scale_counts_from_the_first_of_the_weight(
    canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "BLOCK_WEIGHTS", 64 * 7)
    name, source = exports.expert(2, 1, "up"), Path(shutil.copytree(canonical.parent / "source", tmp_path / "small"))
    exports.change(source, lambda tensors: [t[40:].mul_(1e-7) for n, t in tensors.items() if n == name])
    with pytest.raises(InputError, match=rf"{name}: .* \[40, 0\]"):
        export(source, tmp_path / "from_source", GGUF)


def test_what_has_no_place_in_the_file_is_refused(canonical: Path, tmp_path: Path) -> None:
    source = canonical.parent / "source"
    for options, text in (
        (Options(format="gguf", rule=Int4Rule("amax7", 16)), "groups of 16; a block of Q4_0 has 32 weights"),
        (Options(format="gguf", include=("kv_b_proj",)), "has no tensor in Q4_0 for it"),
        (Options(format="gguf", exclude=(r"layers\.2\.mlp\.experts\.1\.up",)), "would be stored in BF16, Q4_0; a stack has one"),
    ):
        with pytest.raises(InputError, match=text):
            export(source, tmp_path / "out", options)
    export(source, tmp_path / "int4", Options(rule=Int4Rule("amax7", 16)))
    with pytest.raises(InputError, match="groups of 16; a block of Q4_0 has 32 weights"):
        transcode(tmp_path / "int4", tmp_path / "out", GGUF)
    strange = Path(shutil.copytree(source, tmp_path / "strange"))
    exports.change(strange, lambda tensors: tensors.update({"model.stranger": torch.ones(4)}), "model-00001-of-00003.safetensors")
    index = json.loads((strange / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.stranger"] = "model-00001-of-00003.safetensors"
    (strange / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"gguf: model\.stranger has no place in llama\.cpp's glm-dsa"):
        export(strange, tmp_path / "out", GGUF)
    assert not (tmp_path / "out").exists()


def test_larger_groups_and_more_weights(canonical: Path, tmp_path: Path) -> None:
    source = canonical.parent / "source"
    options = Options(format="gguf", rule=Int4Rule("amax7", -1), include=("shared_experts",))
    export(source, tmp_path / "rows", options)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "rows" / "model.gguf").tensors}
    assert kinds["blk.2.ffn_up_shexp.weight"] == "Q4_0"
    assert verify(tmp_path / "rows", source).problems == []


def test_index_heads_that_llama_cpp_aborts_on_are_told_before_anything_is_written(tmp_path: Path) -> None:
    for width, told in ((16, True), (64, False)):
        source = exports.write_source(tmp_path / str(width), index_head_dim=width)
        notes = plan_export(source, Options(format="gguf")).notes
        assert any(f"index heads are {width} wide, and llama.cpp" in note for note in notes) is told
