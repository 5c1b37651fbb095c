"""A tokenizer.json as llama.cpp wants it in a GGUF file: the vocabulary, merges, and a name for how text is cut before merging.

llama.cpp knows ways of cutting text by name and cannot read one from a file. A tokenizer.json whose own way has such a name
gets it; any other is left out, with the reason, since a tokenizer that is nearly right gives a model ids that it never saw.
Without one the model takes and gives token ids.

Source: the reader of vocabularies in llama.cpp (src/llama-vocab.cpp); tests/outside holds the ids of both against each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.quant.gguf_file import Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""
NO_TOKENIZER: dict[str, Value] = {"tokenizer.ggml.model": "none"}
"""A model without a vocabulary."""
GLM = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How GLM-4 and later cut text."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How ByteLevel cuts text when it is told to (`use_regex`)."""
CUTS = {(GLM, True): "glm4", (GLM, False): "chatglm-bpe", (GPT2, False): "gpt-2"}
"""(how text is cut, whether a piece that is a token is taken without merging) -> llama.cpp's name."""
CHAT_TEMPLATE = "chat_template.jinja"
ANY_CUT = "chatglm-bpe"
"""For a vocabulary of single bytes: nothing is merged, so that where text is cut changes nothing."""


def tokenizer_metadata(path: Path, config: Glm5Config) -> dict[str, Value]:
    """The vocabulary of a byte-level BPE tokenizer.json; that there is none where `why_left_out` has a reason.

    Ids without a token get a name of their own that no text gives. No token is put before or after a text. A chat template that
    lies beside it goes with it.

    Raises:
        InputError: a token's id lies outside of the model's vocabulary.
    """
    if why_left_out(path):
        return NO_TOKENIZER
    described = _read(path)
    model, added = described["model"], {entry["content"]: entry for entry in described.get("added_tokens") or ()}
    ids = {**model["vocab"], **{content: entry["id"] for content, entry in added.items()}}
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [UNUSED] * config.vocab_size
    for token, place in ids.items():
        if not 0 <= place < config.vocab_size:
            raise InputError(f"{path}: token {token!r} has id {place}, and the model has {config.vocab_size} tokens")
        tokens[place], kinds[place] = token, NORMAL
        if token in added:
            kinds[place] = CONTROL if added[token].get("special") else USER_DEFINED
    fields: dict[str, Value] = {
        "model": "gpt2",
        "pre": _cut_name(described) or "",
        "tokens": tokens,
        "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())],
        "add_bos_token": False,
        "add_eos_token": False,
    }
    special = {
        "bos": ids.get("[gMASK]", config.bos_token_id),
        "eos": config.eos_token_id[0] if config.eos_token_id else None,
        "eot": ids.get("<|user|>"),
        "eom": ids.get("<|observation|>"),
        "unknown": ids.get("<|endoftext|>"),
        "padding": config.pad_token_id,
    }
    fields |= {f"{kind}_token_id": place for kind, place in special.items() if place is not None}
    template = path.with_name(CHAT_TEMPLATE)
    chat: dict[str, Value] = {"tokenizer.chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | chat


def why_left_out(path: Path) -> str | None:
    """Why llama.cpp could not follow a tokenizer.json to the letter, or that there is none; None if it can."""
    described = _read(path)
    model = described.get("model")
    if not isinstance(model, Mapping):
        return f"there is no {path.name}" if not path.exists() else f"{path.name} describes no tokenizer"
    if model.get("type") != "BPE":
        return f"{path.name} is not BPE but {model.get('type')!r}"
    unheard = [key for key in ("byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix") if model.get(key)]
    if unheard:
        return f"{path.name} has {', '.join(unheard)}, which llama.cpp does not do"
    if described.get("normalizer"):
        return f"{path.name} normalises text, which llama.cpp does not do"
    if any(step.get("type") != "ByteLevel" for step in _steps(described.get("post_processor"), "processors")):
        return f"{path.name} puts tokens around a text, which llama.cpp does by rules of its own"
    greedy = ("lstrip", "rstrip", "single_word")
    if any(entry.get(key) for entry in described.get("added_tokens") or () for key in greedy):
        return f"{path.name} has tokens that take spaces with them or want whole words, which llama.cpp does not do"
    if _cut_name(described) is None:
        return f"{path.name} cuts text in a way that llama.cpp has no name for"
    return None


def _read(path: Path) -> Mapping[str, Any]:
    """A tokenizer.json; nothing if it is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, Mapping) else {}


def _steps(described: Any, within: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json that may be one step, a sequence of them, or none."""
    if not isinstance(described, Mapping):
        return ()
    return described.get(within, ()) if described.get("type") == "Sequence" else (described,)


def _cut_name(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how text is cut: perhaps by a pattern, then ByteLevel; None where it has none."""
    *splits, last = [*_steps(described.get("pre_tokenizer"), "pretokenizers")] or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    whole = ("Split", "Isolated", False)
    if any((split.get("type"), split.get("behavior"), split.get("invert", False)) != whole for split in splits):
        return None
    model, patterns = described["model"], [split.get("pattern", {}).get("Regex") for split in splits]
    if not model.get("merges") and all(len(token) == 1 for token in model["vocab"]):
        return ANY_CUT
    if last.get("use_regex", True):
        patterns.append(GPT2)
    return CUTS.get((patterns[0], bool(model.get("ignore_merges")))) if len(patterns) == 1 else None
