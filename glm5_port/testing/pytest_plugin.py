"""pytest plugin (entry point `glm5_port`): `--require-backend NAME`, and the operator x backend matrix after parity runs.

Results travel as `user_properties` of the reports, so that the matrix is whole under pytest-xdist too.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

RESULTS = "glm5_port_parity"
BACKEND = "glm5_port_backend"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--require-backend`."""
    group = parser.getgroup("glm5_port")
    group.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="Skipped parity tests of this backend are failures, and so is a run in which nothing passed on it. May be repeated.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker and, once per run, the collector of results."""
    config.addinivalue_line("markers", "glm5_width: parity at the widths of the released model; slower")
    required = config.getoption("require_backend")
    if required:
        from glm5_port.errors import did_you_mean
        from glm5_port.plugins import load_plugins
        from glm5_port.registry import BACKENDS

        load_plugins()
        for name in required:
            if name not in BACKENDS:
                raise pytest.UsageError(
                    f"--require-backend {name}: no such backend{did_you_mean(name, BACKENDS)} (known: {', '.join(BACKENDS)})"
                )
    config.pluginmanager.register(Collector(required), "glm5_port_parity_collector")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """A skip of a required backend is a failure."""
    outcome = yield
    report = outcome.get_result()
    backend = dict(item.user_properties).get(BACKEND)
    if report.skipped and not hasattr(report, "wasxfail") and backend in item.config.getoption("require_backend"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"--require-backend {backend}: skipped, and skips count as failures here\n{reason}"


class Collector:
    """Gathers parity results (in the controlling process) and closes the run with the matrix."""

    def __init__(self, required: list[str]) -> None:
        self.required = required
        self.results: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the results off each finished test."""
        if report.when == "call":
            properties: list[tuple[str, Any]] = report.user_properties
            self.results += [result for name, results in properties if name == RESULTS for result in results]

    def missing(self) -> list[str]:
        """Required backends on which no parity case passed."""
        passed = {r["backend"] for r in self.results if r["status"] == "passed"}
        return [name for name in self.required if name not in passed]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fails a run that has proven nothing about a required backend."""
        is_worker = hasattr(session.config, "workerinput")
        if not is_worker and self.missing() and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints the matrix, and why required backends are not proven."""
        if self.results:
            from glm5_port.testing.report import matrix, matrix_lines

            terminalreporter.section("parity: operator x backend")
            for line in matrix_lines(matrix(self.results)):
                terminalreporter.write_line(line)
        for name in self.missing():
            terminalreporter.write_line(f"--require-backend {name}: no parity case passed on it", red=True)
