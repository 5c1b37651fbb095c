"""`glm5-port parity --sweep`."""

from __future__ import annotations

import json


def test_random_cases_run_instead_of_the_named_ones(command_line) -> None:
    arguments = ("parity", "--backend", "cpu", "--operator", "rotate", "--dtype", "float32", "--json")
    done = command_line(*arguments, "--sweep", "2", "--sweep-from", "7")
    assert done.code == 0
    report = json.loads(done.out)
    assert {result["case"] for result in report["results"]} == {"random_7", "random_8"}
    assert report["passed"] and not report["failed"]


def test_a_record_of_random_cases_is_refused(command_line, tmp_path) -> None:
    done = command_line("parity", "--backend", "cpu", "--sweep", "1", "--evidence", str(tmp_path))
    assert done.code == 2 and "leave one of the two out" in done.err
    assert not list(tmp_path.iterdir())
