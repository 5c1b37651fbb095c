"""INT4-aware training of a byte-level checkpoint and the table that says what it is worth."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5_port
from examples.train_tiny_code import corpus, qat_table, train
from examples.train_tiny_code.network import SPARSE, Network
from examples.train_tiny_code.qat import EVERYTHING, EXPERTS, Recipe, Student, write_masters
from glm5_port.errors import InputError
from glm5_port.quant.export import export
from glm5_port.quant.qat import canonical_tensors, prepare_qat
from tests.examples.test_train_tiny_code import FIELDS, PLAN
from tests.tiny_code import CHECKPOINT, held_out_prompt

STREAM = held_out_prompt(4000).flatten()
"""Any text will do for the plumbing."""
RECIPE = Recipe(steps=2, rate=1e-2, rows=2, context=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape of glm5-tiny-code, smaller and barely trained."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    trainer = train.Trainer(PLAN, FIELDS)
    trainer.train_step(held_out_prompt(68).view(2, 34))
    train.write_checkpoint(directory, trainer.weights, FIELDS)
    return directory


@pytest.fixture(scope="module")
def student(source: Path) -> Student:
    """Trained for the two steps of `RECIPE`."""
    made = Student(source, EVERYTHING)
    made.train(STREAM, RECIPE)
    return made


@pytest.fixture(scope="module")
def made(source: Path, student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the student's "masters" and their export "int4"."""
    directory = tmp_path_factory.mktemp("made")
    write_masters(source, directory / "masters", student.masters)
    export(directory / "masters", directory / "int4", EVERYTHING.options())
    return directory


# --- training --------------------------------------------------------------------------------------------------------------


def test_the_export_holds_the_bytes_of_the_last_forward_pass(student: Student, made: Path) -> None:
    used = student.used()
    assert set(used) == set(student.masters) and len(used) > 50
    assert qat_table.same_bytes(made / "int4", used)
    assert any(not torch.equal(master, student.teacher[name]) for name, master in student.masters.items()), "nothing was trained"


@pytest.mark.parametrize("part", [0, 1], ids=["code", "scale"])
def test_one_other_bit_is_seen(student: Student, made: Path, part: int) -> None:
    used = student.used()
    name = next(iter(used))
    changed = [tensor.clone() for tensor in used[name]]
    changed[part].view(torch.int16)[0, 0] ^= 1
    assert not qat_table.same_bytes(made / "int4", used | {name: (changed[0], changed[1])})


def test_prepare_qat_gives_the_same_bytes_for_the_masters(made: Path) -> None:
    """The library's own model, prepared with the same rule and patterns: other code, the same matrices and bits."""
    model = glm5_port.load(made / "masters", "cpu", "float32", mtp=True, trainable=True)
    prepare_qat(model, rule=EVERYTHING.rule, patterns=EVERYTHING.patterns)
    stored = qat_table.stored_tensors(made / "int4")
    prepared = dict(canonical_tensors(model))
    assert {name for name in stored if name.endswith("_packed")} == {name for name in prepared if name.endswith("_packed")}
    assert all(torch.equal(stored[name], tensor) for name, tensor in prepared.items())


def test_masters_differ_from_the_source_in_what_is_quantised_alone(source: Path, student: Student, made: Path) -> None:
    before, after = qat_table.stored_tensors(source), qat_table.stored_tensors(made / "masters")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= set(student.masters)
    assert not any(".indexer." in name for name in changed), "selection has no gradient"
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}


def test_the_control_computes_with_its_masters(source: Path) -> None:
    control = Student(source, EVERYTHING, quantised=False)
    tokens = STREAM[:48].view(2, 24)
    with torch.no_grad():
        assert control.loss(tokens) == 0 and not control.used()
        assert Student(source, EVERYTHING).loss(tokens) > 0


def test_the_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, rate=1.0)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.9 and rates[-1] < 0.03


@pytest.mark.slow
def test_training_wins_back_part_of_the_rounding_loss_of_the_trained_model() -> None:
    """On windows of the training text that no step saw. Twenty-four small steps; the table is of 300 larger ones."""
    torch.set_num_threads(1)
    stream = corpus.token_stream(corpus.standard_library().train)
    student = Student(CHECKPOINT, EVERYTHING)
    unseen = corpus.batch(stream, rows=8, width=256, seed=1, step=0)

    def loss() -> float:
        with torch.no_grad():
            return float(student.loss(unseen))

    before = loss()
    student.train(stream, Recipe(steps=24, rate=1e-4, rows=4, context=256))
    assert loss() < 0.8 * before


# --- the table -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a whole run on three windows."""
    return qat_table.run(source, STREAM, RECIPE, list(STREAM[:99].view(3, 33)), tmp_path_factory.mktemp("run"))


def test_run_measures_every_row_and_says_what_it_did(found: dict[str, Any]) -> None:
    rows = {row["row"]: row for row in found["table"]}
    assert tuple(rows) == ("bf16", "rounded experts", "rounded", "QAT", "control, bf16", "control, rounded")
    assert (found["windows"], found["bytes"]) == (3, 96)
    assert found["export_holds_what_the_last_forward_used"] is True
    assert found["kl_to_teacher"]["before"] > 0
    assert all(0 < row["bits_per_byte"] < 20 for row in rows.values())
    assert rows["rounded"]["bits_per_byte"] != rows["QAT"]["bits_per_byte"] != rows["bf16"]["bits_per_byte"]
    full = rows["bf16"]["bits_per_byte"]
    assert all(row["loss"] == pytest.approx(row["bits_per_byte"] - full) for row in list(rows.values())[1:])
    assert json.loads(json.dumps(found)) == found


def test_what_is_shown_says_the_settings_and_whether_bytes_agree(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    qat_table.show(found)
    shown = capsys.readouterr().out
    assert "of the rounding loss recovered" in shown and EVERYTHING.title in shown and EXPERTS.title in shown
    assert "are those of the last forward pass" in shown
    qat_table.show(found | {"export_holds_what_the_last_forward_used": False})
    assert "are NOT those of the last forward pass" in capsys.readouterr().out


def test_the_share_recovered_and_its_standard_error_are_those_of_paired_windows() -> None:
    bytes_N = torch.tensor([10, 20, 10])
    full = torch.tensor([10.0, 30.0, 25.0], dtype=torch.float64)
    loss = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)  # a tenth of a bit for each byte of every window
    wobble = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    rows = qat_table.table({"bf16": full, "rounded": full + loss, "QAT": full + loss / 4 + wobble}, bytes_N)
    assert rows[0]["bits_per_byte"] == pytest.approx(65 / 40)
    assert (rows[1]["loss"], rows[1]["loss_error"]) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    assert rows[2]["recovered"] == pytest.approx(0.75)
    assert rows[2]["recovered_error"] == pytest.approx(math.sqrt(3 / 2 * 0.5) / 4)
    assert "recovered" not in rows[1] and "loss" not in rows[0]


@pytest.mark.parametrize("setting", [EXPERTS, EVERYTHING], ids=lambda setting: setting.title)
def test_what_is_quantised_is_what_the_title_says(setting: Any) -> None:
    matrices = set(Student(CHECKPOINT, setting).masters)
    experts = {name for name in matrices if ".mlp.experts." in name}
    assert len(experts) == 3 * 16 * 3
    assert setting.rule.group_size == (32 if setting is EXPERTS else -1)
    if setting is EXPERTS:
        assert matrices == experts
    else:
        assert len(matrices - experts) == 38
        assert not any(name.endswith(("mlp.gate.weight", "norm.weight", "weights_proj.weight")) for name in matrices)


def test_the_command_writes_json_and_keeps_the_checkpoints(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ["--steps", "1", "--rows", "1", "--windows", "2", "--out", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["qat_table", str(source), *few, "--json"])
    qat_table.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["windows"], found["recipe"]["steps"]) == (2, 1)
    assert (tmp_path / "kept" / "qat" / "config.json").is_file()


def test_a_source_of_other_tokens_is_refused(tmp_path: Path) -> None:
    fields = FIELDS | {"vocab_size": 256, "eos_token_id": [0], "pad_token_id": 0}
    train.write_checkpoint(tmp_path / "words", train.Trainer(PLAN, fields).weights, fields)
    with pytest.raises(InputError, match="256 tokens"):
        Student(tmp_path / "words", EVERYTHING)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{nowhere}"], "is not a directory"),
        (["{source}", "--windows", "1"], "needs at least 2"),
        (["{source}", "--steps", "0"], "at least 1"),
        (["{source}", "--out", "{source}"], "choose a folder that does not"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(
    arguments: list[str],
    said: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [a.format(nowhere=tmp_path / "nowhere", source=source) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["qat_table", *filled])
    with pytest.raises(SystemExit) as stop:
        qat_table.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_loaded_export_computes_what_training_computed(student: Student, made: Path) -> None:
    """Codes and scales through `int4_matmul` and `expert_mlp_int4`: the logits of the student's last state."""
    model = glm5_port.load(made / "int4", "cpu", "float32")
    assert {"int4_matmul", "expert_mlp_int4"} <= {selection.operator for selection in model.decisions()}
    tokens = STREAM[:40][None]
    weights = student.teacher | {name: student.quantisers[name](master) for name, master in student.masters.items()}
    network = Network(student.config, weights, mode=SPARSE, positions=40)
    with torch.no_grad():
        assert (model(tokens) - network.logits(network.trunk(tokens))).abs().max() < 1e-4
