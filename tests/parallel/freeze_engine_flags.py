"""Writes engine_flags.json anew: the options that each engine's own sources declare, read without installing or importing them.

    pip download --no-deps --dest WHEELS vllm==0.33.0 vllm==0.23.0 sglang==0.5.23 vllm-ascend==0.23.0   # one call for each
    python -m tests.parallel.freeze_engine_flags WHEELS

vllm          names and choices in add_argument(...) of engine/arg_utils.py and entrypoints/; Literals of config/
sglang        fields of the classes in srt/arg_groups/fields/, with their aliases and Literals
vllm-ascend   vllm 0.23.0's options, additional_config keys of ascend_config.py, variables of envs.py
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).parent / "engine_flags.json"
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "vllm-ascend": "0.23.0"}
BASE_OF_ASCEND = "0.23.0"
LITERALS = {
    "--all2all-backend": "All2AllBackend",
    "--kv-cache-dtype": "CacheDType",
    "--dcp-comm-backend": "DCPCommBackend",
    "--distributed-executor-backend": "DistributedExecutorBackend",
}
"""Options of vllm whose choices are a Literal of that name."""


def sources(wheels: Path, package: str, version: str, pattern: str) -> Iterator[tuple[str, ast.Module]]:
    """(name, syntax tree) of each module of a wheel that a pattern finds."""
    found = sorted(wheels.glob(f"{package}-{version}*.whl"))
    if not found:
        raise SystemExit(f"{wheels} has no wheel of {package} {version}: pip download --no-deps {package}=={version}")
    with zipfile.ZipFile(found[0]) as archive:
        for name in archive.namelist():
            if re.search(pattern, name):
                yield name, ast.parse(archive.read(name))


def texts(node: ast.AST) -> list[str]:
    """String constants below a node."""
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def literal(node: ast.AST) -> list[str]:
    """Texts of the Literals below a node."""
    chosen = (each for each in ast.walk(node) if isinstance(each, ast.Subscript) and getattr(each.value, "id", "") == "Literal")
    return [text for each in chosen for text in texts(each.slice)]


def vllm(wheels: Path, version: str) -> dict[str, list[str]]:
    """Option -> choices ([]: any value)."""
    options: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for name, tree in sources(wheels, "vllm", version, r"^vllm/(engine/arg_utils|entrypoints/.*|config/.*)\.py$"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (values := literal(node.value)):
                known[node.targets[0].id] = values
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and "config/" not in name:
                flags = [each.value for each in node.args if isinstance(each, ast.Constant) and str(each.value).startswith("-")]
                options |= {flag: [] for flag in flags}
    return options | {flag: known[of] for flag, of in LITERALS.items() if flag in options and of in known}


def sglang(wheels: Path, version: str) -> dict[str, list[str]]:
    """Option -> choices ([]: any value, or none that its declaration holds)."""
    options: dict[str, list[str]] = {}
    for _, tree in sources(wheels, "sglang", version, r"^sglang/srt/arg_groups/fields/.*\.py$"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if node.target.id.startswith("_"):
                continue
            aliases = [
                text
                for each in ast.walk(node.annotation)
                if isinstance(each, ast.keyword) and each.arg == "aliases"
                for text in texts(each.value)
            ]
            for flag in ("--" + node.target.id.replace("_", "-"), *aliases):
                options[flag] = literal(node.annotation)
    return options


def vllm_ascend(wheels: Path, version: str) -> dict[str, Any]:
    """Options of its vllm, keys of --additional-config, environment variables."""
    keys: set[str] = set()
    variables: set[str] = set()
    for _, tree in sources(wheels, "vllm_ascend", version, r"^vllm_ascend/(ascend_config|utils|envs)\.py$"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "_get_config_value"):
                asked = [text for argument in node.args[:2] for text in texts(argument)]
                keys |= {text for text in asked if re.fullmatch(r"[a-z][a-z0-9_]+", text)}
            if isinstance(node, ast.Compare) and any(getattr(each, "id", "") == "additional_config" for each in node.comparators):
                keys |= set(texts(node.left))
            if isinstance(node, ast.Dict):
                names = [text for key in node.keys if key is not None for text in texts(key)]
                variables |= {name for name in names if name.startswith("VLLM_ASCEND_")}
    return {"options": vllm(wheels, BASE_OF_ASCEND), "additional_config": sorted(keys), "environment": sorted(variables)}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    wheels = Path(sys.argv[1])
    frozen = {
        "vllm": {"version": VERSIONS["vllm"], "options": dict(sorted(vllm(wheels, VERSIONS["vllm"]).items()))},
        "sglang": {"version": VERSIONS["sglang"], "options": dict(sorted(sglang(wheels, VERSIONS["sglang"]).items()))},
        "vllm-ascend": {"version": VERSIONS["vllm-ascend"], **vllm_ascend(wheels, VERSIONS["vllm-ascend"])},
    }
    FROZEN.write_text(json.dumps(frozen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
