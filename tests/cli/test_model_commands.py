"""`glm5-port generate`, `demo`, `bench`, `evidence` and `parity bisect`: the commands that run a model or its operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5_port.model.tensors import expected_tensors
from glm5_port.operators import rms_norm
from glm5_port.testing.tiny import TINY, tiny_config
from glm5_port.text import Text, TextStream, write_byte_tokenizer
from tests.model.int4_checkpoints import int4_export

PROMPT = "def f(x): return x"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GLM-5.2 with an MTP layer and a byte-level tokenizer."""
    from safetensors.torch import save_file

    from glm5_port.model.build import random_weights

    directory = tmp_path_factory.mktemp("tiny")
    config = tiny_config()
    read = random_weights(config, dtype=torch.float32, mtp=True)
    save_file({name: read(name) for name in expected_tensors(config, mtp=True)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY))
    write_byte_tokenizer(directory, ["<pad>", "<end>"])
    return directory


def generate(command_line: Any, checkpoint: Path, *arguments: str, **flags: str) -> dict[str, Any]:
    done = command_line("generate", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "8", "--json", *arguments, **flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_generate_is_what_python_gives(command_line, checkpoint: Path, portable_only: None) -> None:
    import glm5_port

    report = generate(command_line, checkpoint)
    model = glm5_port.load(checkpoint)
    assert report["prompt_ids"] == list(PROMPT.encode())
    assert [report["prompt_ids"] + report["new_ids"]] == model.generate([list(PROMPT.encode())], max_new_tokens=8)
    assert {d["chosen"] for d in report["decisions"]} >= {"torch/eager"}


def test_int4_experts_take_8_bit_activations(command_line, tmp_path: Path) -> None:
    directory = int4_export(tmp_path, ())
    arguments = ("generate", str(directory), "--ids", "3,1,4", "--max-new-tokens", "2", "--json")
    for value, operator in (
        ("int8", "expert_mlp_int4_w4a8"),
        ("int8_groups", "expert_mlp_int4_w4a8"),
        ("wide", "expert_mlp_int4"),
    ):
        done = command_line(*arguments, "--int4-activations", value)
        assert done.code == 0, done.err
        assert operator in {decision["operator"] for decision in json.loads(done.out)["decisions"]}
    done = command_line(*arguments, "--int4-activations", "in8")
    assert done.code == 2
    assert "did you mean int8" in done.err


def test_mtp_and_ids_give_the_same_tokens(command_line, checkpoint: Path) -> None:
    plain = generate(command_line, checkpoint)
    drafted = generate(command_line, checkpoint, "--mtp", "--draft-tokens", "3")
    assert drafted["new_ids"] == plain["new_ids"]
    assert drafted["speculation"]["drafted"] > 0
    ids = ",".join(str(byte) for byte in PROMPT.encode())
    done = command_line("generate", str(checkpoint), "--ids", ids, "--max-new-tokens", "8")
    assert done.out.strip() == ",".join(map(str, plain["new_ids"]))


def test_text_streams_and_decisions_follow(command_line, checkpoint: Path, tmp_path: Path, portable_only: None) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    done = command_line(
        "generate", str(checkpoint), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "8", "--decisions"
    )
    assert done.code == 0
    text = Text(checkpoint).decode(generate(command_line, checkpoint)["new_ids"])
    assert done.out.startswith(text)
    assert "-> torch/eager  chosen" in done.out
    assert "sparse_mla_attention: torch/eager" in done.out


@pytest.mark.parametrize(
    ("arguments", "flags", "said"),
    [
        (("--prompt", "a"), {"GLM5_PORT_BACKEND": "npu"}, "usable here: cpu"),
        (("--prompt", "a"), {"GLM5_PORT_BACKND": "cpu"}, "did you mean GLM5_PORT_BACKEND?"),
        (("--prompt", "a", "--ids", "1"), {}, "exactly one of"),
        (("--ids", "1,two"), {}, "whole numbers separated by commas"),
        (("--ids", "1,400"), {}, "token ids must lie in 0..319"),
        (("--prompt", ""), {}, "at least one token"),
        (("--prompt", "a", "--temperature", "-1"), {}, "temperature"),
        (("--prompt", "a", "--cache-format", "fp9"), {}, "did you mean fp8?"),
        (("--prompt", "a", "--max-new-tokens", "5000"), {}, "max_context=4096"),
        (("--prompt-file", "no-such-file"), {}, "no-such-file"),
    ],
)
def test_wrong_use_is_2_and_says_why(
    command_line, checkpoint: Path, arguments: tuple[str, ...], flags: dict[str, str], said: str
) -> None:
    done = command_line("generate", str(checkpoint), *arguments, **flags)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_folder_without_tokenizer_asks_for_ids(command_line, checkpoint: Path, tmp_path: Path) -> None:
    assert "--ids 1,2,3" in command_line("generate", str(tmp_path), "--prompt", "a").err
    assert "no such directory" in command_line("generate", str(tmp_path / "nowhere"), "--prompt", "a").err


def test_bytes_come_back_whole(checkpoint: Path) -> None:
    text = Text(checkpoint)
    sample = "naïve — 日本語 🎈\n\t\x00\x7f"
    ids = text.encode(sample)
    assert ids == list(sample.encode())
    assert text.decode(ids) == sample
    stream = TextStream(text)
    assert "".join(stream.push([token], last=place == len(ids) - 1) for place, token in enumerate(ids)) == sample


def test_bisect_finds_nothing_in_what_is_right(command_line, checkpoint: Path) -> None:
    done = command_line("parity", "bisect", str(checkpoint), "--prompt-tokens", "12", "--new-tokens", "1", "--json")
    report = json.loads(done.out)
    assert (done.code, report["first"]) == (0, None)
    assert report["calls"] > 100


def test_bisect_names_what_is_wrong(command_line, monkeypatch: pytest.MonkeyPatch, portable_only: None) -> None:
    from glm5_port.operators import gated_mlp

    right = gated_mlp.implementations["torch/eager"].function
    monkeypatch.setattr(
        gated_mlp.implementations["torch/eager"], "function", lambda x, gate_up, down: 2 * right(x, gate_up, down)
    )
    done = command_line("parity", "bisect", "--prompt-tokens", "12", "--new-tokens", "1")
    assert done.code == 1
    assert "gated_mlp by torch/eager" in done.out


@pytest.fixture
def small_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench at the tiny model's widths, with short measurements."""
    from glm5_port.testing import speed

    monkeypatch.setattr("glm5_port.config.released", lambda name: tiny_config())
    monkeypatch.setattr(speed.Machine, "ceilings", lambda self: speed.Ceilings(bandwidth=1e10, matmul_rate=1e11))
    monkeypatch.setattr(speed, "median_seconds", lambda call, device: (call(), 0.5)[1])


def test_bench_covers_what_a_model_calls(command_line, small_workloads, checkpoint: Path) -> None:
    done = command_line("bench", "--context", "64", "--prefill", "8", "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    timings = json.loads(done.out)["timings"]
    used = {decision["operator"] for decision in generate(command_line, checkpoint)["decisions"]}
    assert used - {"write_cache"} <= {timing["operator"] for timing in timings}, (
        "write_cache is timed within mla_prologue_into_cache"
    )
    ran = [timing for timing in timings if timing["refused"] is None]
    assert {timing["seconds"] for timing in ran} == {0.5}
    assert all(timing["floor_seconds"] > 0 and timing["share"] == timing["floor_seconds"] / 0.5 for timing in ran)


def test_bench_shows_no_speed_where_parity_is_red(command_line, small_workloads, monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = rms_norm.implementations["torch/eager"]
    monkeypatch.setattr(implementation, "function", lambda x, weight, eps: x * weight)
    done = command_line("bench", "--operator", "rms_norm", "--context", "64", "--prefill", "8")
    assert done.code == 1
    assert "no speed" in done.out
    assert "parity is red" in done.out


def test_bench_refuses_a_chunk_longer_than_the_context(command_line) -> None:
    done = command_line("bench", "--context", "8", "--prefill", "9")
    assert (done.code, done.out) == (2, "")


def test_evidence_says_what_is_stale(command_line, tmp_path: Path, portable_only: None) -> None:
    assert command_line("parity", "--small", "--operator", "rms_norm", "--evidence", str(tmp_path)).code == 0
    fresh = json.loads(command_line("evidence", str(tmp_path), "--json").out)
    assert fresh["stale"] == []
    row = next(row for row in fresh["table"] if row["operator"] == "rms_norm")
    assert "torch/eager" in row["cpu"]
    assert row["npu"] == "npu/aclnn: never run on hardware"
    (others,) = (column for column in row if "kunlunxin" in column)
    assert "never run" in row[others]
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    record["rows"][0]["source"] = "0" * 16
    path.write_text(json.dumps(record))
    assert "STALE  rms_norm torch/eager" in command_line("evidence", str(tmp_path)).out
    assert command_line("evidence", str(tmp_path / "nowhere")).code == 2


def test_a_digest_does_not_depend_on_what_is_loaded() -> None:
    import subprocess
    import sys

    from glm5_port.testing.cases import load_suites
    from glm5_port.testing.evidence import source_hash

    load_suites()
    code = (
        "import glm5_port.testing.evidence as e; from glm5_port.operators import rms_norm as r; "
        "print(e.source_hash(r.implementations['torch/eager']))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert fresh == source_hash(rms_norm.implementations["torch/eager"])


def test_generated_docs_are_up_to_date() -> None:
    import runpy

    generated = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))["generated"]()
    for path, text in generated.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


def test_demo_says_when_the_trained_model_is_not_at_hand(tmp_path: Path) -> None:
    from glm5_port.cli.demo import _int4

    said: list[str] = []
    assert _int4(said.append, tmp_path / "nowhere", tmp_path) is None
    assert "NOT SHOWN" in said[0]


@pytest.mark.slow
def test_demo_passes_and_keeps_its_checkpoint(command_line, tmp_path: Path) -> None:
    done = command_line("demo", "--keep", str(tmp_path / "kept"), "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["agreement"]["passed"]
    assert report["parity"]["failed"] == 0
    assert report["int4"]["bytes_of_training_are_bytes_of_export"]
    first, *_, last = report["int4"]["bits_per_byte_on_the_training_bytes"]
    assert last < first
    assert (tmp_path / "kept" / "config.json").is_file()
