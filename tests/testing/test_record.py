"""Record and replay, evidence, the matrix and the command, on a few operators."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch

from glm5_port.cli import parity as command
from glm5_port.errors import InputError, ParityError
from glm5_port.operators import rms_norm
from glm5_port.registry import BACKENDS, OPERATORS
from glm5_port.testing import evidence, parity, record, report
from glm5_port.testing.cases import WIDTH, load_suites
from tests.portable import without_native_kernels

NAMES = ["rms_norm", "write_cache", "select_top_k"]


@pytest.fixture(scope="module", autouse=True)
def portable_only():
    """A CPU without kernels of its own: what is recorded and shown here is that of portable implementations."""
    with without_native_kernels():
        yield


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "cpu.npz"
    results = record.record(path, parity.implementations_on("cpu", NAMES), small=True, dtypes=[torch.bfloat16])
    assert {r.status for r in results} == {"passed"}
    return path, results


def rewritten(path, target, change_index=lambda index: None, change=lambda arrays: None):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    index = json.loads(arrays["index"].tobytes())
    change_index(index)
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    change(arrays)
    np.savez(target, **arrays)
    return target


def test_a_recording_holds_what_identifies_it(recording):
    path, results = recording
    with np.load(path, allow_pickle=False) as file:
        index = json.loads(file["index"].tobytes())
    assert (index["kind"], index["format"]) == (record.KIND, record.FORMAT)
    assert index["device"]["torch"] == torch.__version__
    assert len(index["entries"]) == len(results)
    assert all(len(entry["inputs"]) == 64 and len(entry["source"]) == 16 for entry in index["entries"])


def test_the_same_machine_replays_to_equal_bits(recording):
    path, results = recording
    replays = record.replay(path)
    assert len(replays) == len(results)
    for replayed in replays:
        assert replayed.recorded.status == "passed"
        assert all(mine.status == "passed" for mine in replayed.here)
        assert replayed.difference["torch/eager"] == 0.0
    table = command.replay_report("cpu", replays)
    assert table["failures"] == []
    assert all(pair["cases"] == pair["equal"] for pair in table["pairs"])
    assert {replayed.recorded.operator for replayed in record.replay(path, operators=["rms_norm"])} == {"rms_norm"}


def test_a_recorded_mistake_is_found_by_the_gold(recording, tmp_path):
    path, _ = recording

    def flip(arrays):
        key = next(k for k in arrays if k != "index" and arrays[k].size > 64)
        arrays[key] = arrays[key].copy()
        arrays[key][1::2] ^= 0x40  # exponents of bfloat16

    replays = record.replay(rewritten(path, tmp_path / "wrong.npz", change=flip))
    failed = [replayed for replayed in replays if replayed.recorded.status == "failed"]
    assert len(failed) == 1
    assert failed[0].difference["torch/eager"] > 0.0
    assert command.replay_report("cpu", replays)["failures"][0].startswith("recorded: ")


def test_other_inputs_name_the_case_and_the_versions(recording, tmp_path):
    path, _ = recording
    changed = rewritten(path, tmp_path / "inputs.npz", lambda index: index["entries"][0].update(inputs="0" * 64))
    with pytest.raises(ParityError, match=r"the inputs made here are not the recorded ones") as raised:
        record.replay(changed)
    text = str(raised.value)
    assert "no_tokens, bfloat16" in text
    assert f"here torch {torch.__version__}" in text
    assert "random numbers" in text


def test_changed_cases_are_named_as_the_reason(recording, tmp_path):
    path, _ = recording
    changed = rewritten(path, tmp_path / "c.npz", lambda index: index["entries"][0].update(inputs="0" * 64, contract="other"))
    with pytest.raises(ParityError, match="the operator's cases were changed since"):
        record.replay(changed)


def test_unknown_cases_are_refused(recording, tmp_path):
    path, _ = recording
    changed = rewritten(path, tmp_path / "case.npz", lambda index: index["entries"][0].update(case="gone"))
    with pytest.raises(ParityError, match=r"\[gone, bfloat16\] is not a case of this version"):
        record.replay(changed)


def test_files_that_cannot_be_read(recording, tmp_path):
    path, _ = recording
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        cut = tmp_path / f"cut{size}.npz"
        cut.write_bytes(whole[:size])
        with pytest.raises(ParityError, match="not a parity record, or truncated"):
            record.replay(cut)
    with pytest.raises(ParityError, match="no such file"):
        record.replay(tmp_path / "absent.npz")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(ParityError, match="not a parity record"):
        record.replay(text)
    archive = tmp_path / "zip.npz"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(ParityError, match="not a parity record"):
        record.replay(archive)


def test_foreign_and_older_records(recording, tmp_path):
    path, _ = recording
    foreign = rewritten(path, tmp_path / "foreign.npz", lambda index: index.update(kind="something else"))
    with pytest.raises(ParityError, match="but not a parity record"):
        record.replay(foreign)
    older = rewritten(path, tmp_path / "older.npz", lambda index: index.update(format=0))
    with pytest.raises(ParityError, match="of format 0, this version reads 1"):
        record.replay(older)


def test_missing_outputs_are_named(recording, tmp_path):
    path, _ = recording
    short = rewritten(path, tmp_path / "short.npz", change=lambda arrays: arrays.update({"1.0": arrays["1.0"][:-2]}))
    with pytest.raises(ParityError, match=r"output 1\.0 is missing or has \d+ bytes instead of \d+"):
        record.replay(short)


def test_a_chip_that_is_not_here_cannot_replay(recording):
    with pytest.raises(ParityError, match="cannot be replayed on npu"):
        record.replay(recording[0], backend="npu")


def test_wrong_outputs_are_not_recorded(tmp_path):
    wrong = dataclasses.replace(rms_norm.implementations["torch/eager"], function=lambda x, weight, eps: x * 2, torch_op=None)
    results = record.record(tmp_path / "x.npz", [wrong], small=True, dtypes=[torch.float32])
    failed = sum(r.status == "failed" for r in results)
    assert failed > 0
    with np.load(tmp_path / "x.npz") as file:
        assert len(json.loads(file["index"].tobytes())["entries"]) == len(results) - failed


def test_the_digest_sees_every_bit():
    x = torch.ones(3, 2)
    base = record.input_digest({"x": x, "eps": 1.0})
    assert record.input_digest({"eps": 1.0, "x": x.t().contiguous().t()}) == base
    other = x.clone()
    other[2, 1] = torch.nextafter(other[2, 1], torch.tensor(2.0))
    for changed in (
        {"x": other, "eps": 1.0},
        {"x": x.reshape(2, 3), "eps": 1.0},
        {"x": x, "eps": 2.0},
        {"x": x.double(), "eps": 1.0},
    ):
        assert record.input_digest(changed) != base


# -- evidence ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return [r.as_dict() for r in parity.run_chip("cpu", NAMES, without_tags=WIDTH, dtypes=[torch.float32])]


def test_evidence_is_written_read_and_goes_stale(results, tmp_path, monkeypatch):
    made = evidence.evidence(results, "cpu")
    path = evidence.write_evidence(made, tmp_path)
    assert evidence.write_evidence(made, tmp_path) == path
    (read,) = evidence.read_evidence(tmp_path)
    assert read == json.loads(json.dumps(made))
    row = next(r for r in read["rows"] if r["operator"] == "rms_norm")
    assert row["passed"] > 5
    assert row["failed"] == 0
    assert 0 < row["worst_errors"]["budget_share"] <= 1
    assert evidence.stale_rows(read) == []
    text = path.read_text()
    assert "/root" not in text
    assert "/work" not in text

    read["rows"][0]["source"] = "0" * 16
    read["rows"].append({**row, "implementation": "cuda/gone"})
    stale = evidence.stale_rows(read)
    assert len(stale) == 2
    assert "changed since" in stale[0]
    assert "cuda/gone: does not exist any more" in stale[1]
    read["device"]["backend"] = "nochip"
    assert evidence.stale_rows(read) == ["backend nochip is not registered here"]


def test_source_hash_follows_module_contract_and_cases(monkeypatch):
    implementation = rms_norm.implementations["torch/eager"]
    before = evidence.source_hash(implementation)
    real = evidence._source
    for module in ("glm5_port.backends.torch.norm", "glm5_port.operators.norm", "glm5_port.operators.cases.norm"):
        monkeypatch.setattr(evidence, "_source", lambda m, module=module: real(m) + (b"#" if m == module else b""))
        assert evidence.source_hash(implementation) != before
    load_suites()
    assert all(real(m) != m.encode() for m in evidence._contract_modules(rms_norm))


def test_evidence_that_cannot_be_read(tmp_path):
    (tmp_path / "parity-x.json").write_text("{")
    with pytest.raises(ParityError, match="not JSON"):
        evidence.read_evidence(tmp_path)
    (tmp_path / "parity-x.json").write_text("{}")
    with pytest.raises(ParityError, match="not a parity record of format 1"):
        evidence.read_evidence(tmp_path)
    assert evidence.read_evidence(tmp_path / "absent") == []


# -- the matrix --------------------------------------------------------------------------------------------------------


def test_matrix_has_every_operator_and_chip(results):
    table = report.matrix(results)
    assert table["columns"] == [*BACKENDS, "torch"]
    assert set(table["rows"]) == set(OPERATORS)
    passed = sum(r["operator"] == "rms_norm" for r in results)
    assert table["rows"]["rms_norm"]["torch"] == f"{passed} passed"
    assert table["rows"]["rms_norm"]["cpu"] == f"{passed} passed by torch"
    assert table["rows"]["rotate"]["torch"] == report.NO_TEST
    assert table["rows"]["rms_norm"]["gcu"] == report.NOTHING
    assert table["rows"]["rms_norm"]["npu"] == report.NO_TEST
    assert "cpu" not in table["not_tested"]
    assert table["not_tested"]["npu"]
    lines = report.matrix_lines(table)
    assert any(line.startswith("NOT TESTED HERE: npu (") for line in lines)
    assert any("NO TEST" in line and "rotate" in line for line in lines)


def test_matrix_tells_failures_and_reasons_of_skips():
    def row(status, implementation, backend, problem=""):
        return {
            "operator": "rms_norm", "implementation": implementation, "backend": backend, "case": "c", "dtype": "float32",
            "status": status, "problems": [problem] if problem else [], "errors": {},
        }  # fmt: skip

    added = rms_norm.implement("npu", variant="tried")
    added(lambda x, weight, eps: x)
    try:
        rows = [
            row("failed", "torch/eager", "cpu", "wrong"),
            row("passed", "torch/eager", "cpu"),
            row("declined", "npu/tried", "npu", "no kernel"),
        ]
        table = report.matrix(rows)
        assert table["rows"]["rms_norm"]["cpu"] == "1 FAILED, 1 passed by torch"
        assert table["rows"]["rms_norm"]["npu"] == "1 skipped (no kernel)"
        lines = report.matrix_lines(table)
        assert any("1 skipped [1]" in line for line in lines)
        assert "  [1] no kernel" in lines
        assert report.matrix([])["rows"]["rms_norm"]["npu"] == report.NO_TEST
    finally:
        del rms_norm.implementations["npu/tried"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_run_parity_and_its_table(capsys, set_flags):
    made = command.run_parity("cpu", ["rms_norm"], small=True, dtype="bfloat16")
    assert made["failed"] == 0
    assert made["passed"] == len(made["results"]) > 5
    assert json.loads(json.dumps(made))["summary"][0]["operator"] == "rms_norm"
    command.print_report(made)
    out = capsys.readouterr().out
    assert "torch/eager" in out
    assert "NOT TESTED HERE: npu" in out


def test_wrong_use_of_the_command(set_flags):
    with pytest.raises(InputError, match=r"--dtype bfloat17: not a working dtype; did you mean bfloat16\?"):
        command.run_parity("cpu", dtype="bfloat17")
    with pytest.raises(InputError, match="no such operator"):
        command.run_parity("cpu", ["nothing"])
