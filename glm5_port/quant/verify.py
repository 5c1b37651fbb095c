"""Verifies an INT4 checkpoint: everything that loaders let pass.

Four layers, each of which needs more than the one before: the checkpoint alone (names, shapes, files, config, codes, scales), its
manifest (sha256 of files, digests of tensors), and the source (recomputation). Problems are gathered, not raised, and name
tensors.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.config_file import read_json
from glm5_port.errors import CheckpointError, Glm5PortError, InputError
from glm5_port.model.stored_tensors import StoredTensor, StoredTensors
from glm5_port.quant.config_text import KEY, without_quantization
from glm5_port.quant.files import Reader, hash_file, tensor_digest
from glm5_port.quant.formats import Format, format_of, stored_group_size
from glm5_port.quant.int4 import LEARNED, Int4Rule, groups_of
from glm5_port.quant.manifest import read_manifest, rule_of
from glm5_port.quant.output_files import Facts, PlannedTensor
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import BF16, INT4, Options, Plan, plan_export
from glm5_port.quant.structure import Structure, read_structure
from glm5_port.quant.transcode import is_int4, plan_transcode
from glm5_port.quant.writing import made, read_parts

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, name of the tensor)."""
BLOCK_WORDS = 2**17
"""Packed words that are looked at together: 2^20 codes."""


@dataclass(slots=True)
class Verified:
    """What was found.

    Attributes:
        path: of the checkpoint.
        problems: what is wrong, one sentence each; empty when everything that was checked is right.
        checked: what was checked, with counts.
        notes: what could not be checked, and why.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    path: str | PathLike[str],
    source: str | PathLike[str] | None = None,
    *,
    sample: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Verified:
    """Verifies an INT4 checkpoint.

    Args:
        path: of the checkpoint.
        source: what it was exported from; weights are then quantised again and compared byte by byte.
        sample: with `source`, compare only so many tensors (always the same ones); None compares all.
        workers: threads.
        progress: called after each tensor.

    Raises:
        ConfigError, CheckpointError: `path` is no checkpoint at all, or `source` is no whole one.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory\n  expected: the directory of an INT4 checkpoint")
    raw = read_json(directory)
    config = Glm5Config.from_dict({key: value for key, value in raw.items() if key != KEY})
    manifest = read_manifest(directory)
    output_format = format_of(raw.get(KEY), manifest, directory)
    stored = output_format.container.read(directory)
    if manifest is None and KEY not in raw and not stored.faults and not output_format.weights(stored.tensors):
        raise CheckpointError(
            f"{directory} holds no INT4 weights, nor does its config.json announce any\n"
            "  expected: the directory of an INT4 checkpoint; glm5-port info says whether one in bf16 or block-FP8 is whole"
        )
    result = Verified(directory)
    result.problems += [f"files: {fault}" for fault in stored.faults]
    rule = _rule(manifest, output_format, stored, result)
    mtp_absent = bool(manifest and manifest.get("mtp") == "none")
    structure = read_structure(config, raw.get(KEY), stored, rule, output_format, mtp_absent=mtp_absent)
    result.problems += structure.problems
    result.checked.append(f"{len(stored.tensors):,} tensors: names, shapes, dtypes, index, config.json")
    if strangers := [name for name in stored.tensors if name not in structure.owners]:
        result.notes.append(f"{len(strangers):,} tensors are not known here, for example {strangers[0]}")
    facts = Facts(config, rule, 0, directory)
    result.problems += output_format.container.problems(directory, stored, facts)
    plan = None if source is None else _plan(Path(source), manifest, structure, result)
    chosen = [] if plan is None else _chosen(plan, sample)
    steps = _Steps(
        len(manifest["files"] if manifest else ()) + len(structure.weights) + len(structure.int8) + len(chosen), progress
    )
    with Reader(directory) as reader, ThreadPoolExecutor(workers) as pool:
        if manifest is None:
            result.notes.append("there is no int4_manifest.json, so no sha256 could be compared")
        else:
            _check_hashes(directory, stored, reader, manifest, result, pool, steps)
        _gather(result, pool.map(lambda name: steps.after(name, _check_values(name, structure, reader)), structure.weights))
        result.checked.append(f"{len(structure.weights):,} quantised weights: codes, scales and shapes")
        if structure.int8:
            _gather(result, pool.map(lambda name: steps.after(name, _check_int8(name, structure, reader)), structure.int8))
            result.checked.append(f"{len(structure.int8):,} INT8 weights: codes, scales and offsets")
        if plan is not None:
            if rule.name == LEARNED:
                plan = replace(plan, scales=_stored_scales(structure, reader))
            _compare_plan(plan, stored, structure, result)
            with Reader(plan.source) as given:

                def compare(tensor: PlannedTensor) -> list[str]:
                    return steps.after(tensor.name, _compare_tensor(plan, tensor, stored, given, reader))

                _gather(result, pool.map(compare, chosen))
            result.checked.append(
                f"{len(chosen):,} of {len(plan.tensors):,} tensors: made again from {plan.source}, byte by byte"
            )
    return result


class _Steps:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def after(self, name: str, found: list[str]) -> list[str]:
        """Counts a step and hands its findings on."""
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total, name)
        return found


def _gather(result: Verified, found: Iterable[list[str]]) -> None:
    for problems in found:
        result.problems += problems


def _rule(manifest: Mapping[str, Any] | None, output_format: Format, stored: StoredTensors, result: Verified) -> Int4Rule:
    """The rule that the manifest records; without one, amax7 with the group size that most tensors have."""
    if manifest is not None:
        return rule_of(manifest)
    result.notes.append("there is no manifest that names the rule: amax7 is assumed")
    return Int4Rule("amax7", stored_group_size(output_format, stored.tensors))


# --- the manifest ----------------------------------------------------------------------------------------------------------


def _check_hashes(
    directory: Path,
    stored: StoredTensors,
    reader: Reader,
    manifest: Mapping[str, Any],
    result: Verified,
    pool: ThreadPoolExecutor,
    steps: _Steps,
) -> None:
    """Compares sha256 of files with the manifest; in files that differ, digests of every tensor, so that tensors are named."""
    listed, files = manifest["tensors"], manifest["files"]
    result.problems += [f"{name} is in the manifest and not in the checkpoint" for name in listed if name not in stored.tensors]
    result.problems += [f"{name} is in the checkpoint and not in the manifest" for name in stored.tensors if name not in listed]
    digests = pool.map(lambda name: steps.after(name, [_digest(directory / name)])[0], files)
    changed = {name for name, digest in zip(files, digests, strict=True) if digest != files[name]["sha256"]}
    for name in sorted(changed):
        what = "does not have the sha256 of the manifest" if (directory / name).exists() else "is missing"
        result.problems.append(f"{name} {what}")
    by_digest: dict[str, list[str]] = {}
    for name, entry in listed.items():
        by_digest.setdefault(entry["xxh3_128"], []).append(name)

    def check(name: str) -> list[str]:
        try:
            digest = _tensor_digest(stored.tensors[name], reader)
        except CheckpointError as error:
            return [f"{name}: {error}"]
        if digest == listed[name]["xxh3_128"]:
            return []
        others = by_digest.get(digest, [])
        return [f"{name} does not have the digest of the manifest" + (f": it holds the bytes of {others[0]}" if others else "")]

    suspects = [name for name, tensor in stored.tensors.items() if tensor.file in changed and name in listed]
    _gather(result, pool.map(check, suspects))
    result.checked.append(f"{len(files):,} files: sha256 of the manifest")


def _digest(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError:
        return ""


def _tensor_digest(tensor: StoredTensor, reader: Reader) -> str:
    digest = tensor_digest()
    for chunk in reader.chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


# --- codes and scales ------------------------------------------------------------------------------------------------------


def _check_values(name: str, structure: Structure, reader: Reader) -> list[str]:
    """What is wrong with the codes and scales of one weight."""
    rule, problems = structure.rule, []
    lowest = -8 if rule.name == "signed8" else -7
    counts = {"below": 0, "infinite": 0, "not positive": 0, "loose": 0}
    try:
        for codes, scales in read_codes(name, structure, reader):
            wide = scales.to(torch.float32)
            counts["below"] += int((codes < lowest).sum())
            counts["infinite"] += int((~wide.isfinite()).sum())
            counts["not positive"] += int((wide == 0).sum() if rule.name == "signed8" else (wide <= 0).sum())
            if rule.name == "amax7":
                reach = codes.abs().unflatten(-1, (scales.shape[-1], -1)).amax(-1)
                counts["loose"] += int((~((reach == 7) | ((reach == 0) & (wide == 1)))).sum())
        problems += structure.check_constants(name, reader)
    except Glm5PortError as error:
        return [f"{name}: {error}"]
    texts = {
        "below": f"codes below {lowest}, which rule {rule.name} never gives",
        "infinite": "scales that are NaN or infinite",
        "not positive": "scales that are zero" if rule.name == "signed8" else "scales that are not positive",
        "loose": "groups without a code of magnitude 7, which rule amax7 never gives",
    }
    return problems + [f"{name}: {count:,} {texts[kind]}" for kind, count in counts.items() if count]


def _check_int8(name: str, structure: Structure, reader: Reader) -> list[str]:
    """What is wrong with a weight in INT8: every row reaches 127, or is zero with the scale 1; offsets are zero."""
    try:
        codes, scales, offsets = (reader.whole(tensor) for tensor in structure.int8[name].values())
    except Glm5PortError as error:
        return [f"{name}: {error}"]
    reach = codes.to(torch.int16).abs().amax(1)
    fitting = (reach == 127) | ((reach == 0) & (scales[:, 0] == 1))
    counts = {
        "rows without a code of magnitude 127, or with -128": int((~fitting).sum()),
        "scales that are not positive and finite": int((~(scales.isfinite() & (scales > 0))).sum()),
        "offsets that are not zero": int(torch.count_nonzero(offsets)),
    }
    return [f"{name}: {count:,} {what}" for what, count in counts.items() if count]


def read_codes(name: str, structure: Structure, reader: Reader) -> Iterator[tuple[Tensor, Tensor]]:
    """(codes, scales) of blocks of rows of a weight."""
    tensors = structure.weights[name]
    if not structure.format.row_blocks:
        yield _regrouped(structure, name, read_parts(tensors, reader, None))
        return
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    rows = max(tensor.shape[0] for tensor in matrices)
    widest = max(tensor.bytes // max(tensor.shape[0], 1) for tensor in matrices)
    step = max(1, 4 * BLOCK_WORDS // max(widest, 1))
    for first in range(0, rows, step):
        yield _regrouped(structure, name, read_parts(tensors, reader, (first, min(first + step, rows))))


def _regrouped(structure: Structure, name: str, read: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales, one for each group of the rule: a format may repeat those of a larger group."""
    packed, scales = structure.format.decode(read, name)
    codes = unpack_int4(packed)
    groups, size = groups_of(codes.shape[1], structure.rule.group_size, name=name)
    if groups >= scales.shape[1]:
        return codes, scales
    repeated = scales.unflatten(1, (groups, -1))
    if not torch.equal(repeated, repeated[..., :1].expand_as(repeated)):
        raise CheckpointError(f"scales differ within groups of {size}, the group size that is recorded")
    return codes, repeated[..., 0]


# --- the source ------------------------------------------------------------------------------------------------------------


def _plan(source: Path, manifest: Mapping[str, Any] | None, structure: Structure, result: Verified) -> Plan | None:
    """The plan by which this checkpoint must have been exported, or transcoded; None, and a problem, if there can be none."""
    if manifest is not None:
        options = Options(
            format=manifest["format"],
            rule=structure.rule,
            mtp=manifest["mtp"] if manifest["mtp"] in (INT4, BF16) else INT4,
            include=tuple(manifest["include"]),
            exclude=tuple(manifest["exclude"]),
            max_shard_bytes=manifest["max_shard_bytes"],
        )
    elif is_int4(source):
        options = Options(structure.format.name, structure.rule, mtp=structure.choice.mtp)
    else:
        options = Options(structure.format.name, structure.rule, **asdict(structure.choice))
    try:
        plan = plan_transcode(source, options) if is_int4(source) else plan_export(source, options)
    except InputError as error:
        result.problems.append(f"no export of the source gives this checkpoint: {str(error).splitlines()[0]}")
        return None
    if not plan.has_weights:
        raise CheckpointError(f"{source} holds no weights to compare with")
    return plan


def _stored_scales(structure: Structure, reader: Reader) -> Callable[[str], Tensor]:
    """Gives the scales of a weight as the checkpoint has them: learned ones follow from no source, but codes follow from both."""

    @lru_cache(maxsize=16)  # a weight is quantised a block of rows at a time
    def scales(name: str) -> Tensor:
        if name not in structure.weights:
            raise CheckpointError("not whole, so its learned scales are not known")
        found = torch.cat([block.to(torch.bfloat16) for _, block in read_codes(name, structure, reader)])
        if not ((found > 0) & found.isfinite()).all():
            raise CheckpointError("its learned scales are not all positive and finite, so no codes can be made with them")
        return found

    return scales


def _chosen(plan: Plan, sample: int | None) -> list[PlannedTensor]:
    tensors = list(plan.tensors)
    return tensors if sample is None or sample >= len(tensors) else random.Random(0).sample(tensors, sample)


def _compare_plan(plan: Plan, stored: StoredTensors, structure: Structure, result: Verified) -> None:
    """Names and config.json against what an export of this source would write."""
    planned = {output.name for tensor in plan.tensors for output in tensor.outputs}
    result.problems += [f"{name} is missing: the source has it" for name in sorted(planned - set(stored.tensors))]
    result.problems += [f"{name} is not in the source" for name in sorted(set(stored.tensors) - planned)]
    text = (result.path / "config.json").read_text(encoding="utf-8")
    if json.loads(without_quantization(text)) != json.loads(without_quantization(plan.config_text)):
        result.problems.append("config.json differs from that of the source in more than quantization_config")
    elif json.loads(text) != json.loads(plan.config_text):
        result.problems.append("config.json: quantization_config is not what an export of this source writes")
    for name, expected in plan.files().items():
        file = result.path / name
        if not file.exists() or file.read_text(encoding="utf-8") != expected:
            result.problems.append(f"{name} is {'not what an export of this source writes' if file.exists() else 'missing'}")


def _compare_tensor(plan: Plan, tensor: PlannedTensor, stored: StoredTensors, given: Reader, reader: Reader) -> list[str]:
    """Makes the output tensors again, a block at a time, and compares their bytes."""
    outputs = {output.name: stored.tensors.get(output.name) for output in tensor.outputs}
    places = dict.fromkeys(outputs, 0)
    wrong = dict.fromkeys(outputs, 0)
    try:
        for name, data in made(plan, tensor, given):
            there = outputs[name]
            if there is not None:
                count = min(len(data), max(0, there.bytes - places[name]))
                wrong[name] += count < len(data) or reader.bytes(there, places[name], count) != data
                places[name] += count
    except Glm5PortError as error:
        return [f"{tensor.name}: {error}"]
    return [f"{name} is not what the source gives" for name, blocks in wrong.items() if blocks]
