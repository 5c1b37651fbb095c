"""The frozen operator schemas of torch_npu that calls of the npu backend are held against: reads and regenerates them.

    python -m tests.backends.npu_schemas WHEEL...     rewrites npu_schemas.json from wheels of the supported versions

A wheel is only read as an archive, never installed: `pip download --no-deps torch_npu==2.13.0` fetches one. The file holds, for
every vendor operator that the backend may call, each distinct schema with the versions that have it.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

from glm5_port.backends.npu.contracts import VENDOR_OPERATORS

FROZEN = Path(__file__).with_name("npu_schemas.json")
VERSIONS = ("2.10", "2.11", "2.12", "2.13", "2.14")
_DECLARATIONS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def schemas_of(wheel: Path, names: set[str]) -> dict[str, str]:
    """The schemas of the operators of those names that a wheel declares."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(_DECLARATIONS).decode()
    declared = re.findall(r"func: *(\w+)(\(.*->.*)", text)
    return {name: name + rest.strip() for name, rest in declared if name in names}


def frozen(version: str) -> dict[str, str]:
    """Operator -> schema in a supported version; operators that it lacks are missing."""
    table = json.loads(FROZEN.read_text())
    return {
        name: schema for name, schemas in table.items() for schema, versions in schemas.items() if version in versions.split()
    }


def _main(wheels: list[str]) -> None:
    names = set(VENDOR_OPERATORS)
    table: dict[str, dict[str, list[str]]] = {name: {} for name in sorted(names)}
    for wheel in sorted(Path(path) for path in wheels):
        version = re.sub(r"^torch_npu-(\d+\.\d+).*", r"\1", wheel.name)
        for name, schema in schemas_of(wheel, names).items():
            table[name].setdefault(schema, []).append(version)
    compact = {name: {schema: " ".join(sorted(v)) for schema, v in schemas.items()} for name, schemas in table.items()}
    FROZEN.write_text(json.dumps(compact, indent=1) + "\n")
    seen = sorted({version for schemas in table.values() for versions in schemas.values() for version in versions})
    print(f"{FROZEN.name}: {len(table)} operators in torch_npu {', '.join(seen)}")


if __name__ == "__main__":
    _main(sys.argv[1:])
