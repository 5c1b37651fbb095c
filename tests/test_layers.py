"""Imports keep to docs/architecture.md: operators know no backend, the model knows neither, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {
    "operators": ("backends", "model", "parallel", "cli"),
    "backends": ("model", "parallel", "testing", "cli"),
    "model": ("backends", "parallel", "testing", "cli"),
    "parallel": ("backends", "testing", "cli"),
    "quant": ("parallel", "testing", "cli"),
    "testing": ("backends", "parallel", "quant", "cli"),
}
"""Part of the package -> parts that it may not import. What lies beside them (registry, config, ...) imports none of these."""


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in (ROOT / "glm5_port").rglob("*.py")}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(module of the package, whether it is imported with the file and not within a function), without what only types need."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "glm5_port":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in FILES else node.module), at_once
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names if alias.name in FILES)
        inside = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), True)


GRAPH = {module: set(imports(path.read_text())) for module, path in FILES.items()}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def reaching_up(graph: dict[str, set[tuple[str, bool]]]) -> list[str]:
    """The imports that `ABOVE` forbids."""
    return [
        f"{module} imports {other}"
        for module, found in sorted(graph.items())
        for other, _ in sorted(found)
        if part_of(other) in ABOVE.get(part_of(module), () if part_of(module) in ("", "cli", "__main__") else tuple(ABOVE))
    ]


def circle(graph: dict[str, set[tuple[str, bool]]]) -> list[str]:
    """The modules of a circle of imports that are made at once, in order; empty without one."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other, at_once in sorted(graph.get(module, ())):
            if at_once and other != module and (found := walk(other, [*path, module])):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_nothing_reaches_back_up() -> None:
    assert len(FILES) > 100 and all(any(part_of(module) == part for module in FILES) for part in ABOVE)
    assert reaching_up(GRAPH) == []


def test_no_circles() -> None:
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("glm5_port.operators.norm", "from glm5_port.backends.torch import norm"),
        ("glm5_port.backends.cpu.norm", "def f():\n    from glm5_port.model.cache import Span"),
        ("glm5_port.registry", "import glm5_port.model.cache"),
    ],
)
def test_an_import_that_reaches_up_is_found(module: str, source: str) -> None:
    assert len(reaching_up({module: set(imports(source))})) == 1


def test_a_circle_is_found_and_what_only_types_need_is_none() -> None:
    there = set(imports("from glm5_port.flags import read"))
    assert circle({"glm5_port.errors": there, "glm5_port.flags": set(imports("from glm5_port import errors"))})
    guarded = "if TYPE_CHECKING:\n    from glm5_port import errors\ndef f():\n    import glm5_port.errors"
    assert not circle({"glm5_port.errors": there, "glm5_port.flags": set(imports(guarded))})
