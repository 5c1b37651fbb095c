"""The tests of the native kernels notice a broken specification, and no instruction set lends its code to another.

Every mutant is the specification of one family, or its kernels of tiles, compiled with one mistake and linked with the other
objects of one build; the family's tests (native/tests) compare it with the other kernels and with known results, and must fail.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.backends.native_mutants import MUTANTS, NATIVE, TILES, NativeMutant

REPOSITORY = Path(__file__).parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FAMILIES = sorted({mutant.family for mutant in MUTANTS})
WITHOUT_VECTORS = ("limits",)
"""Families that compute nothing: loops that measure the machine."""


def _run(*command: str | Path, cwd: Path | None = None, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": TOOLS}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def _must(*command: str | Path, cwd: Path | None = None) -> str:
    ran = _run(*command, cwd=cwd)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_the_text_of_every_mutant_stands_once(mutant: NativeMutant) -> None:
    assert mutant.source() != (NATIVE / mutant.family / mutant.file).read_text()


def test_every_family_has_tests_and_six_mutants() -> None:
    listed = re.search(r"set\(FAMILIES ([a-z0-9_ ]+)\)", (NATIVE / "CMakeLists.txt").read_text())
    assert listed is not None
    families = set(listed[1].split()) - set(WITHOUT_VECTORS)
    assert families - {path.stem.removeprefix("test_") for path in (NATIVE / "tests").glob("test_*.cpp")} == set()
    counts = {family: sum(mutant.family == family for mutant in MUTANTS) for family in families}
    assert {family: count for family, count in counts.items() if count < 6} == {}


# -- symbols -----------------------------------------------------------------------------------------------------------


def lent(objects: Sequence[Path]) -> list[str]:
    """Functions that the linker may merge with those of other objects, outside of the namespaces of instruction sets.

    A function that is compiled for AVX-512 and merged into scalar code ends a process on machines without AVX-512.
    """
    own = re.compile(r"glm5::(avx2|avx512|avx512_bf16|amx)::")
    found = []
    for path in objects:
        for line in _must("nm", "-C", "--defined-only", path).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind == "W" and not own.match(name):
                found.append(f"{path.name}: {name}")
    return found


def vector_objects(build: Path) -> list[Path]:
    """The objects of units that are compiled for one instruction set."""
    return sorted(
        path for path in build.glob("CMakeFiles/glm5_kernels.dir/*.o") if re.search(r"\.cpp\.[a-z0-9_]+\.cpp\.o$", path.name)
    )


@pytest.mark.skipif(not shutil.which("nm"), reason="NOT TESTED: there is no nm to look at objects with")
def test_no_instruction_set_lends_its_code() -> None:
    builds = {path: vector_objects(path) for path in (REPOSITORY / "build").glob("*") if path.name != "sanitize"}
    if not any(builds.values()):
        pytest.skip("NOT TESTED here: no objects of a build are at hand; the slow test makes its own")
    assert [name for objects in builds.values() for name in lent(objects)] == []


# -- the build -----------------------------------------------------------------------------------------------------------


class Build:
    """native_tests without sanitizers, and how to make it again with one unit exchanged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _must(
            *("cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja", "-DGLM5_PORT_TESTS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        )
        _must("ninja", "-C", folder, "native_tests")
        self.tests = folder / "native_tests"
        self._commands = {
            Path(entry["file"]): shlex.split(entry["command"])
            for entry in json.loads((folder / "compile_commands.json").read_text())
        }

    def _objects(self, family: str, unit: Path) -> list[Path]:
        """All of the tests of one family but that of one unit."""
        kernels = (self.folder / "CMakeFiles/glm5_kernels.dir").rglob("*.o")
        tests = (self.folder / "CMakeFiles/native_tests.dir/tests" / f"{name}.cpp.o" for name in ("main", f"test_{family}"))
        command = self._commands[unit]
        return [path for path in (*kernels, *tests) if path != self.folder / command[command.index("-o") + 1]]

    def run_mutant(self, mutant: NativeMutant, folder: Path) -> subprocess.CompletedProcess[str]:
        """Compiles, links and runs the tests of its family up to the first failure."""
        changed = folder / mutant.family / mutant.file
        changed.parent.mkdir(parents=True)
        changed.write_text(mutant.source())
        tiles = mutant.unit == TILES
        unit = self.folder / f"{mutant.family}_{TILES}" if tiles else NATIVE / mutant.family / mutant.unit
        source = changed if mutant.file == unit.name else unit
        made, tests = folder / "unit.o", folder / "native_tests"
        words = [str(source) if Path(word) == unit else word for word in self._commands[unit]]
        words[words.index("-o") + 1] = str(made)
        _must(words[0], f"-I{folder}", *words[1:], cwd=self.folder)  # headers of the mutant come first
        _must(words[0], "-fopenmp", *self._objects(mutant.family, unit), made, "-o", tests)
        return _run(tests, "--first-failure", timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="NOT TESTED: mutants of the native kernels (no C++ compiler)")
def test_every_mutant_is_caught_and_the_unbroken_pass(tmp_path: Path) -> None:
    """One test, so that there is one build."""
    if not all(shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja", "nm")):
        pytest.skip("NOT TESTED: mutants of the native kernels (cmake, ninja or nm is missing)")
    build = Build(tmp_path / "build")
    objects = vector_objects(build.folder)
    assert objects
    assert lent(objects) == []

    unbroken = _run(build.tests)
    assert unbroken.returncode == 0, unbroken.stdout + unbroken.stderr
    if "avx2" not in unbroken.stdout.splitlines()[0].split():
        pytest.skip("NOT TESTED: mutants of the native kernels (this machine has no vector kernels to compare them with)")
    emulates = "avx512_bf16" in unbroken.stdout.splitlines()[0].split()  # vectors beside the tiles
    mutants = [mutant for mutant in MUTANTS if emulates or mutant.unit != TILES]

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda i: build.run_mutant(mutants[i], tmp_path / f"mutant{i}"), range(len(mutants)))
        results = dict(zip(mutants, runs, strict=True))
    escaped = {
        mutant.id: run.returncode for mutant, run in results.items() if run.returncode != 1 or "not so: " not in run.stdout
    }
    assert escaped == {}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or not shutil.which("nm"), reason="NOT TESTED: no C++ compiler, or no nm")
def test_what_could_be_lent_is_noticed(tmp_path: Path) -> None:
    unit, made = tmp_path / "unit.cpp", tmp_path / "unit.o"
    unit.write_text("#include <algorithm>\nvoid f(int* a, int* b) { std::sort(a, b); }\n")
    _must(str(COMPILER), "-O1", "-c", unit, "-o", made)
    assert any("std::__introsort_loop" in name for name in lent([made]))
