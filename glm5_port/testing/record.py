"""Record and replay: compares machines that never share a host.

`record` writes one file: for every case the digest of its inputs and the bits of the outputs. `replay` makes the same
inputs here, checks the digests, and holds both the recorded outputs and this machine's against the float64 gold; the direct
difference is reported, and not judged: two right answers may differ by their roundings.

The file is a numpy `.npz` without pickles: one array of bytes per output, and the member `index` with JSON.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5_port.errors import ParityError
from glm5_port.registry import BACKENDS, Implementation
from glm5_port.requests import probe
from glm5_port.testing.calls import bits, call_with_prepared, flat, run_outputs, to_device
from glm5_port.testing.cases import WIDTH, Case, Suite, load_suites
from glm5_port.testing.evidence import contract_hash, device_description, source_hash
from glm5_port.testing.parity import ParityResult, Truth, implementations_on, run_case, truth_of

FORMAT = 1
KIND = "glm5_port parity record"
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Replay:
    """What came of one recorded case.

    Attributes:
        recorded: the recorded outputs, held against this machine's gold.
        here: this machine's implementations on the same case.
        difference: implementation here -> largest absolute difference to the recording over the gold's RMS; 0.0 = equal.
    """

    recorded: ParityResult
    here: list[ParityResult] = field(default_factory=list)
    difference: dict[str, float] = field(default_factory=dict)


def input_digest(arguments: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bits of all tensors, and over the text of everything else."""
    digest = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        tensors = list(flat(value))
        digest.update(f"{name}:{len(tensors)}:{'' if tensors else repr(value)};".encode())
        for tensor in tensors:
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(bits(tensor).numpy().tobytes())
    return digest.hexdigest()


def record(
    path: str | Path,
    implementations: Sequence[Implementation],
    *,
    backend: str = "cpu",
    small: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    progress: Progress | None = None,
) -> list[ParityResult]:
    """Runs every case, writes what passed parity here to one file, and returns all results.

    An output that is wrong already is not recorded: a recording says "this device, done right, gives this".
    """
    arrays: dict[str, np.ndarray] = {}
    entries: list[dict[str, Any]] = []
    results: list[ParityResult] = []
    work = list(_work(implementations, small, dtypes))
    for done, (suite, case, dtype, mine) in enumerate(work):
        if progress:
            progress(f"{suite.operator.name} {case.name} {_plain(dtype)}", done, len(work))
        truth = truth_of(suite, case, dtype)
        for implementation in mine:
            chip = implementation.backend if implementation.backend in BACKENDS else backend
            if (missing := probe(chip).missing) is not None:
                results.append(
                    ParityResult(
                        suite.operator.name, implementation.id, case.name, _plain(dtype), "unavailable", [missing], backend=chip
                    )
                )
                continue
            device = BACKENDS[chip].device_type
            result = run_case(suite, implementation, case, dtype, device, backend=chip, truth=truth)
            results.append(result)
            if result.status != "passed":
                continue
            outputs = _outputs(truth, implementation, device)
            keys = [f"{len(entries)}.{place}" for place in range(len(outputs))]
            arrays |= {key: bits(t).numpy().reshape(-1) for key, t in zip(keys, outputs, strict=True)}
            entries.append(
                {
                    "operator": suite.operator.name,
                    "implementation": implementation.id,
                    "backend": chip,
                    "case": case.name,
                    "dtype": _plain(dtype),
                    "inputs": input_digest(truth.arguments),
                    "outputs": [
                        {"key": k, "shape": list(t.shape), "dtype": _plain(t.dtype)} for k, t in zip(keys, outputs, strict=True)
                    ],
                    "source": source_hash(implementation),
                    "contract": contract_hash(suite.operator),
                }
            )
    index = {"kind": KIND, "format": FORMAT, "device": device_description(backend), "entries": entries}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return results


def replay(
    path: str | Path, *, backend: str = "cpu", operators: Sequence[str] | None = None, progress: Progress | None = None
) -> list[Replay]:
    """Compares a recording with what `backend` computes here. Every recorded case is judged; nothing is skipped silently.

    Raises:
        ParityError: the file cannot be read, or its cases are not the cases of this version, or the inputs made here differ.
    """
    index, arrays = _read(path)
    if (missing := probe(backend).missing) is not None:
        raise ParityError(f"{path}: cannot be replayed on {backend}: {missing}")
    suites = load_suites()
    replays: list[Replay] = []
    truths: dict[tuple[str, str, str], Truth] = {}
    locals_: dict[tuple[str, str, str], list[tuple[ParityResult, list[Tensor] | None]]] = {}
    entries = [e for e in index["entries"] if operators is None or e["operator"] in operators]
    for done, entry in enumerate(entries):
        if progress:
            progress(f"{entry['operator']} {entry['case']} {entry['dtype']}", done, len(entries))
        key = (entry["operator"], entry["case"], entry["dtype"])
        if key not in truths:
            truths.clear()  # entries of one case stand together; keeping one gold at a time bounds memory
            truths[key] = _truth_of_entry(path, index, entry, suites)
            locals_ = {key: _run_here(truths[key], backend)}
        truth = truths[key]
        outputs = [_tensor(path, arrays, spec) for spec in entry["outputs"]]
        problems, errors = truth.judge(outputs)
        result = ParityResult(
            *key[:1], entry["implementation"], *key[1:], "failed" if problems else "passed", problems, errors, entry["backend"]
        )
        replays.append(Replay(result, [mine for mine, _ in locals_[key]]))
        for mine, theirs in locals_[key]:
            if theirs is not None and mine.status == "passed":
                replays[-1].difference[mine.implementation] = _difference(outputs, theirs, truth.gold)
    return replays


def _work(
    implementations: Sequence[Implementation], small: bool, dtypes: Sequence[torch.dtype] | None
) -> Iterator[tuple[Suite, Case, torch.dtype, list[Implementation]]]:
    for name, suite in load_suites().items():
        mine = [i for i in implementations if i.operator.name == name]
        for case in suite.cases if mine else ():
            if not (small and case.tags & WIDTH):
                for dtype in case.dtypes:
                    if dtypes is None or dtype in dtypes:
                        yield suite, case, dtype, mine


def _outputs(truth: Truth, implementation: Implementation, device: str) -> list[Tensor]:
    facts = truth.suite.operator.facts_of(truth.arguments) | {"device_type": torch.device(device).type}
    return run_outputs(truth.suite.operator, call_with_prepared(implementation, facts), to_device(truth.arguments, device))


def _run_here(truth: Truth, backend: str) -> list[tuple[ParityResult, list[Tensor] | None]]:
    device = BACKENDS[backend].device_type
    found: list[tuple[ParityResult, list[Tensor] | None]] = []
    for implementation in implementations_on(backend, [truth.suite.operator.name]):
        result = run_case(truth.suite, implementation, truth.case, truth.dtype, device, backend=backend, truth=truth)
        found.append((result, _outputs(truth, implementation, device) if result.status == "passed" else None))
    return found


def _truth_of_entry(path: str | Path, index: Mapping[str, Any], entry: Mapping[str, Any], suites: Mapping[str, Suite]) -> Truth:
    where = f"{entry['operator']} [{entry['case']}, {entry['dtype']}]"
    suite = suites.get(entry["operator"])
    case = next((c for c in suite.cases if c.name == entry["case"]), None) if suite else None
    if suite is None or case is None:
        raise ParityError(
            f"{path}: {where} is not a case of this version of glm5_port\n"
            f"  recorded with glm5_port {index['device']['glm5_port']}; record again with this version, or replay with that one"
        )
    truth = truth_of(suite, case, getattr(torch, entry["dtype"]))
    if (mine := input_digest(truth.arguments)) != entry["inputs"]:
        same = contract_hash(suite.operator) == entry["contract"]
        why = "PyTorch's random numbers or roundings differ" if same else "the operator's cases were changed since"
        raise ParityError(
            f"{path}: {where}: the inputs made here are not the recorded ones "
            f"({mine[:12]} instead of {entry['inputs'][:12]}): {why}\n"
            f"  recorded with torch {index['device']['torch']}, glm5_port {index['device']['glm5_port']}; "
            f"here torch {torch.__version__}\n"
            "  Record and replay with the same versions on both machines."
        )
    return truth


def _read(path: str | Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        index = json.loads(arrays["index"].tobytes())
    except FileNotFoundError as error:
        raise ParityError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise ParityError(
            f"{path}: not a parity record, or truncated ({type(error).__name__}: {error})\n"
            "  `glm5-port parity record FILE` writes one"
        ) from error
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise ParityError(f"{path}: a numpy archive, but not a parity record\n  `glm5-port parity record FILE` writes one")
    if index.get("format") != FORMAT:
        raise ParityError(
            f"{path}: parity record of format {index.get('format')}, this version reads {FORMAT}\n"
            "  Record again with the same version of glm5_port on both machines."
        )
    return index, arrays


def _tensor(path: str | Path, arrays: Mapping[str, np.ndarray], spec: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, spec["dtype"])
    size = int(np.prod(spec["shape"], dtype=np.int64)) * dtype.itemsize
    raw = arrays.get(spec["key"])
    if raw is None or raw.nbytes != size:
        raise ParityError(
            f"{path}: output {spec['key']} is missing or has {0 if raw is None else raw.nbytes} bytes instead of {size}"
        )
    return torch.from_numpy(raw.copy()).view(dtype).reshape(spec["shape"]) if size else torch.empty(spec["shape"], dtype=dtype)


def _difference(recorded: Sequence[Tensor], here: Sequence[Tensor], gold: Sequence[Tensor]) -> float:
    largest = 0.0
    for a, b, truth in zip(recorded, here, gold, strict=True):
        if a.numel():
            scale = torch.nan_to_num(truth.double(), 0.0, 0.0, 0.0).square().mean().sqrt().item() or 1.0
            difference = torch.where(bits(a).eq(bits(b)).all(-1), 0.0, (a.double() - b.double()).abs())
            largest = max(largest, torch.nan_to_num(difference, torch.inf).max().item() / scale)
    return largest


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
