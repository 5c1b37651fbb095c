"""llama.cpp as a judge of GGUF files: `make test-llama-cpp`.

Four models, each with a tokenizer, exported to INT4 and to GGUF, over contexts longer than index_topk: glm5-tiny-code with its
trained weights, a random one, one with groups of experts and INT4 in attention and shared experts too, one without an MTP layer
in several files. For each:

decoded     Every tensor of the file decoded to float32 by gguf-py. llama.cpp then computes with the very numbers of this
            library's model: all logits within `DECODED` of their spread.
as it is    The file itself. llama.cpp rounds activations, to 8 bits in blocks of 32 for Q4_0 and to bfloat16 for bfloat16, so
            that a token near a tie takes another expert or another position to attend to. The median difference stays below
            `MEDIAN` of the spread, and the greedy token of every position whose margin exceeds `MARGIN` of the spread is the
            same. Judged on the trained weights only: random ones tie so often that this rounding makes another model of them.
tokens      A text gives the ids that tokenizers gives.
faults      Files with a fault in them do differ: gate and up of a layer exchanged, another index_topk.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from glm5_port.quant.export import export
from glm5_port.quant.formats.gguf_tokenizer import GLM, why_left_out
from glm5_port.quant.plan import Options
from glm5_port.testing.tiny import TINY
from tests.outside.judging import ROOT, TINY_CODE, Verdict, decoded_model, main, play, write_random

ENVIRONMENT, PLAYER = ".venv-llama-cpp", "llama_cpp_player.py"
DECODED, MEDIAN, MARGIN = 5e-5, 0.01, 0.1
"""Limits, of the standard deviation of the logits."""
NEW = 16
"""Tokens generated one at a time."""
MORE = (r"self_attn\.(q_b|o)_proj", r"shared_experts")
PART = 1_000_000
FAULTS = ("gate and up exchanged", "another index_topk")
FACTOR = 100
"""How far beyond `DECODED` a fault must be."""
TEXT = (
    "def café(x):\r\n\treturn x + 12345  # I'LL say it's 100% naïve\n\n\n   중문 混ぜる 🙂 \u00a0 <|user|>they've\n"
    "    for i in range(7): print('…', \"«»\", i**2)  \n <think>'S 'Re a1b22c333d4444</think> "
)
"""Contractions in both cases, digits, runs of spaces and newlines, other scripts, a character beyond the first plane, and tokens
that are not text."""


@dataclass(frozen=True)
class Case:
    """A model to judge: its canonical checkpoint, its GGUF file, the tokens that it reads, whether its weights are trained."""

    name: str
    canonical: Path
    file: Path
    tokens: list[int]
    trained: bool

    @property
    def files(self) -> int:
        """How many parts the file has."""
        return len(list(self.file.parent.glob("*.gguf")))

    def request(self, kind: str, fault: str | None = None) -> dict[str, Any]:
        """What the player is asked."""
        whole = {"name": f"{self.name}/{kind}", "file": str(self.file), "decoded": kind != "as it is", "fault": fault}
        return {**whole, "tokens": self.tokens, "new": 1 if fault else NEW, "text": TEXT if kind == "as it is" else None}


def glm_tokenizer(size: int, *, whole_pieces: bool) -> dict[str, Any]:
    """A tokenizer.json cut as GLM's are, with merges learned from this project's own documents."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(GLM), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learned = _learned(tokenizer, size)
    learned["model"]["ignore_merges"] = whole_pieces
    return learned


def gpt2_tokenizer(size: int) -> dict[str, Any]:
    """A tokenizer.json cut as GPT-2's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _learned(tokenizer, size)


def _learned(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=alphabet, show_progress=False)
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer.train_from_iterator([*texts, TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|user|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def cases(directory: Path) -> list[Case]:
    """Makes the models and their files."""
    made = [_case(directory, "glm5-tiny-code", TINY_CODE, list((ROOT / "LICENSE").read_bytes()[:400]))]
    tokens = np.random.default_rng(0).integers(0, 1000, 120).tolist()
    grouped = {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "index_topk": 24}
    for name, changes, tokenizer, options in (
        ("random", {}, glm_tokenizer(1024, whole_pieces=True), Options()),
        ("random, groups", grouped, glm_tokenizer(1024, whole_pieces=False), Options(include=MORE)),
        ("random, parts", {"num_nextn_predict_layers": 0, "index_topk": 5}, gpt2_tokenizer(1024), Options(max_shard_bytes=PART)),
    ):
        source = write_random(directory / f"{name} bf16", {**TINY, "vocab_size": 1024, **changes})
        (source / "tokenizer.json").write_text(json.dumps(tokenizer))
        made.append(_case(directory, name, source, tokens, options))
    return made


def _case(directory: Path, name: str, source: Path, tokens: list[int], options: Options = Options()) -> Case:
    canonical, written = directory / name, directory / f"{name} gguf"
    export(source, canonical, options)
    export(source, written, replace(options, format="gguf"))
    return Case(name, canonical, sorted(written.glob("*.gguf"))[0], tokens, trained=source == TINY_CODE)


def judge(verdict: Verdict, directory: Path) -> None:
    """Asks llama.cpp about every case at once, then compares."""
    made = cases(directory)
    requests = [case.request(kind) for case in made for kind in ("decoded", "as it is")]
    requests += [case.request(fault, fault) for case in made for fault in FAULTS]
    (directory / "requests.json").write_text(json.dumps(requests))
    play(ENVIRONMENT, PLAYER, str(directory / "requests.json"), str(directory / "answers.npz"))
    answers = np.load(directory / "answers.npz")
    for case in made:
        model = decoded_model(case.canonical)
        with torch.no_grad():
            ours = model(torch.tensor([case.tokens]))[0]
        config = model.config
        owners = sum(config.owns_indexer(layer) for layer in config.layers)
        verdict.note(
            f"{case.name}: {config.num_hidden_layers} layers, {owners} with an indexer, {len(case.tokens)} tokens, "
            f"index_topk {config.index_topk}, spread of the logits {ours.std():.2f}, files: {case.files}"
        )
        generated = model.generate([case.tokens], max_new_tokens=NEW, stop_ids=())[0][-NEW:]
        for kind in ("decoded", "as it is"):
            theirs = torch.from_numpy(answers[f"{case.name}/{kind}/logits"])
            agrees, text = compare(kind, ours, theirs, generated, answers[f"{case.name}/{kind}/greedy"].tolist())
            if kind == "decoded" or case.trained:
                verdict.check(agrees, text)
            else:
                verdict.note(f"  reported {text}")
        judge_tokens(verdict, case, answers[f"{case.name}/as it is/ids"].tolist())
        for fault in FAULTS:
            worst = float((ours - torch.from_numpy(answers[f"{case.name}/{fault}/logits"])).abs().max() / ours.std())
            text = f"fault      {fault}: largest difference {worst:.2g} of the spread; at least {FACTOR * DECODED:.2g} asked for"
            verdict.check(worst > FACTOR * DECODED, text)


def compare(kind: str, ours: Tensor, theirs: Tensor, own: list[int], other: list[int]) -> tuple[bool, str]:
    """Logits position by position, greedy tokens wherever the margin is wide enough, and tokens generated one at a time."""
    spread, difference = float(ours.std()), (ours - theirs).abs()
    decoded, top = kind == "decoded", ours.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > (DECODED if decoded else MARGIN) * spread
    same = ours.argmax(-1) == theirs.argmax(-1)
    near = difference.max() <= DECODED * spread if decoded else difference.median() <= MEDIAN * spread
    text = (
        f"{kind:10} logits differ by {float(difference.max()):.2g} at most, {float(difference.median()):.2g} in the middle; "
        f"greedy tokens equal at {int(same.sum())} of {len(same)} positions, {int((same & clear).sum())} of the "
        f"{int(clear.sum())} with a clear margin; {sum(a == b for a, b in zip(own, other, strict=True))} of {len(own)} generated"
    )
    return bool(near) and bool(same[clear].all()) and (own == other or not decoded), text


def judge_tokens(verdict: Verdict, case: Case, theirs: list[int]) -> None:
    """The ids of a text, against tokenizers."""
    path = case.canonical / "tokenizer.json"
    if reason := why_left_out(path):
        raise RuntimeError(f"{case.name}: the tokenizer was left out: {reason}")
    ours = Tokenizer.from_file(str(path)).encode(TEXT).ids
    verdict.check(ours == theirs, f"tokens     {len(ours)} ids of a text of {len(TEXT.encode())} bytes")


if __name__ == "__main__":
    sys.exit(main("llama.cpp", judge))
