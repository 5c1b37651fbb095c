"""`glm5-port info`: what a checkpoint (or a config.json alone) is, how big, what its cache takes, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_text

if TYPE_CHECKING:
    from glm5_port.config import Glm5Config

CONTEXTS = (4096, 32768, 131072, 1048576)
FORMATS = {  # what it is called -> formats of the latent cache and of the index cache
    "plain": ("plain", "plain"),
    "plain latent, fp8 index": ("plain", "fp8"),
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
}
HUGGING_FACE_LATENT_EPS = 1e-6


def info(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory, or a config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Say what a checkpoint is: family member, parameters, files, cache and memory. Exit 1 if its files are not whole."""
    description = describe(checkpoint)
    print_json(description) if as_json else print_text(render(description))
    if description["checkpoint"] is not None and description["checkpoint"]["problems"]:
        raise typer.Exit(1)


def describe(path: str | PathLike[str]) -> dict[str, Any]:
    """What `info --json` prints, as plain data. Reads config.json and the headers of the weight files.

    Args:
        path: a checkpoint directory, a directory with only a config.json, or a config.json.

    Raises:
        ConfigError: when config.json is missing, broken, or of another architecture.
        CheckpointError: when the weight files cannot even be listed. Files that are incomplete or do not fit are no error
            here; they are told under checkpoint / problems.
    """
    from glm5_port.config import Glm5Config
    from glm5_port.model.accounting import active_parameters, checkpoint_storage, count_int4, count_parameters

    config = Glm5Config.from_json(path)
    counted, described = count_parameters(config), checkpoint_storage(config)
    return {
        "path": str(path),
        "family": config.family_member,
        "config": {name: value for name, value in config.as_dict().items() if not isinstance(value, list | dict)},
        "layers": {
            "dense": config.num_hidden_layers - len(config.moe_layers),
            "mixture_of_experts": len(config.moe_layers),
            "mtp": config.num_nextn_predict_layers,
        },
        "index_sharing": {
            "full_layers": list(config.full_layers),
            "pattern": "".join("F" if config.owns_indexer(layer) else "S" for layer in config.layers),
        },
        "latent_norm_eps": {
            "load": config.latent_norm_eps,
            "hugging_face": HUGGING_FACE_LATENT_EPS,
            "rms_norm_eps": config.rms_norm_eps,
        },
        "rope_theta": config.rope_theta,
        "notes": list(config.notes),
        "parameters": {
            "components": counted.components,
            "trunk": counted.trunk,
            "mtp": counted.mtp,
            "total": counted.total,
            "active_per_token": active_parameters(config),
            "correction_biases": counted.correction_biases,
            "int4": count_int4(config),
        },
        "described": {"tensors": described.tensors, "bytes": described.bytes},
        "checkpoint": _checkpoint(Path(path)),
        **_memory(config),
    }


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """What the weight files hold; None where there are none to look at."""
    from glm5_port.errors import CheckpointError
    from glm5_port.model.checkpoint import Checkpoint
    from glm5_port.model.tensors import expected_tensors

    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        return None
    with Checkpoint.open(path) as checkpoint:
        problems = ""
        try:
            checkpoint.check(expected_tensors(checkpoint.config, mtp=checkpoint.has_mtp))
        except CheckpointError as error:
            problems = str(error)
        tensors = checkpoint.tensors.values()
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.dtype] += tensor.bytes
        quantization = checkpoint.config.quantization
        return {
            "files": len(checkpoint.stored.files),
            "tensors": len(tensors),
            "bytes": sizes.total(),
            "bytes_by_dtype": dict(sizes.most_common()),
            "block_fp8": None if quantization is None else list(quantization.block),
            "int4_group_size": None if checkpoint.config.int4 is None else checkpoint.config.int4.group_size,
            "mtp_present": checkpoint.has_mtp,
            "stop_ids": list(checkpoint.stop_ids or checkpoint.config.eos_token_id),
            "problems": problems,
        }


def _memory(config: Glm5Config) -> dict[str, Any]:
    """Bytes of cache for a token in each format, and memory for one sequence at a few contexts."""
    import torch

    from glm5_port.errors import InputError
    from glm5_port.model.accounting import cache_bytes_per_token, memory_need

    dtype = getattr(torch, config.dtype or "bfloat16")
    cache: dict[str, Any] = {}
    for name, (latent, index) in FORMATS.items():
        try:
            found = cache_bytes_per_token(config, dtype, latent, index)
            cache[name] = {"latent": found.latent, "index": found.index, "total": found.total, "unfit": None}
        except InputError as error:
            cache[name] = {"latent": None, "index": None, "total": None, "unfit": str(error).splitlines()[0]}
    limit = config.max_position_embeddings
    needs = []
    for context in sorted({min(context, limit) for context in (*CONTEXTS, limit)}):
        for cache_format in ("plain", "fp8", "int8"):
            if cache[cache_format]["unfit"] is None:
                need = memory_need(config, context, dtype=dtype, cache_format=cache_format)
                needs.append({"context": context, "cache_format": cache_format, "weights": need.weights, "cache": need.cache})
    return {"working_dtype": config.dtype or "bfloat16", "cache_bytes_per_token": cache, "memory": needs}


# -- text --------------------------------------------------------------------------------------------------------------


def render(description: dict[str, Any]) -> str:
    """The description as text for people."""
    blocks = [
        _what(description),
        _parameters(description),
        _cache(description),
        _needs(description),
        _remarks(description),
        _problems(description),
    ]
    return "\n\n".join(block for block in blocks if block)


def _what(d: dict[str, Any]) -> str:
    layers, sharing = d["layers"], d["index_sharing"]
    eps = d["latent_norm_eps"]
    mtp = ", 1 MTP layer announced" if layers["mtp"] else ", no MTP layer"
    rows = [
        ("family", f"{d['family']} ({d['config']['model_type']})"),
        ("layers", f"{layers['dense']} dense, {layers['mixture_of_experts']} mixture of experts{mtp}"),
        ("indexers", f"{len(sharing['full_layers'])} of {len(sharing['pattern'])} layers own one: {sharing['pattern']}"),
        ("context", f"{d['config']['max_position_embeddings']:,} tokens, rope theta {d['rope_theta']:,.10g}"),
        ("latent norm eps", f"{eps['load']:g} is what load uses; Hugging Face computes with {eps['hugging_face']:g}"),
    ]
    found = d["checkpoint"]
    if found is None:
        size = f"{d['described']['tensors']:,} tensors, {_size(d['described']['bytes'])}"
        rows.append(("checkpoint", f"no weights here; the full checkpoint is {size}"))
    else:
        kinds = ", ".join(f"{dtype} {_size(size)}" for dtype, size in found["bytes_by_dtype"].items())
        scheme = f"block-FP8 {found['block_fp8'][0]} x {found['block_fp8'][1]}, " if found["block_fp8"] else ""
        if found["int4_group_size"] is not None:
            scheme = f"INT4 {_groups(found['int4_group_size'])}, "
        number = f"{found['files']} file{'s' * (found['files'] != 1)}, {found['tensors']:,} tensors"
        whole = "whole: every name, shape and dtype is as expected"
        rows += [
            ("checkpoint", f"{scheme}{number}, {found['bytes']:,} bytes ({kinds})"),
            ("MTP tensors", "present" if found["mtp_present"] else "absent"),
            ("stop ids", ", ".join(map(str, found["stop_ids"])) or "none"),
            ("state", "NOT USABLE, see problems" if found["problems"] else whole),
        ]
    return _aligned([(f"{name}:", text) for name, text in rows])


def _parameters(d: dict[str, Any]) -> str:
    counted = d["parameters"]
    rows = [*counted["components"].items(), ("total without MTP", counted["trunk"])]
    if counted["mtp"]:
        rows += [("MTP layer", counted["mtp"]), ("total with MTP", counted["total"])]
    rows.append(("active per token", counted["active_per_token"]))
    rows = [(name, f"{count:,}", _share(counted["int4"].get(name, 0), count)) for name, count in rows]
    return "parameters\n" + _aligned(rows, indent="  ", right=1)


def _groups(size: int) -> str:
    from glm5_port.config_quantization import PER_CHANNEL

    return "with a scale for each row" if size == PER_CHANNEL else f"in groups of {size}"


def _share(int4: int, count: int) -> str:
    """How much of a component is INT4."""
    return "" if not int4 else "in INT4" if int4 == count else f"{int4:,} of them in INT4"


def _cache(d: dict[str, Any]) -> str:
    rows = [("format", "latent", "index keys", "bytes per token", "")]
    for name, size in d["cache_bytes_per_token"].items():
        if size["unfit"]:
            rows.append((name, "-", "-", "-", size["unfit"]))
        else:
            rows.append((name, f"{size['latent']:,}", f"{size['index']:,}", f"{size['total']:,}", _size(size["total"])))
    return "cache, all layers, without MTP\n" + _aligned(rows, indent="  ")


def _needs(d: dict[str, Any]) -> str:
    rows = [("context", "cache format", "weights", "cache", "together")]
    for need in d["memory"]:
        together = _size(need["weights"] + need["cache"])
        rows.append((f"{need['context']:,}", need["cache_format"], _size(need["weights"]), _size(need["cache"]), together))
    heading = (
        f"memory for one sequence, weights in {d['working_dtype']} (FP8 is multiplied out while loading), without activations\n"
    )
    return heading + _aligned(rows, indent="  ")


def _remarks(d: dict[str, Any]) -> str:
    return "\n".join(["notes", *(f"  {note}" for note in d["notes"])]) if d["notes"] else ""


def _problems(d: dict[str, Any]) -> str:
    found = d["checkpoint"]
    return f"problems\n  {found['problems']}" if found and found["problems"] else ""


def _aligned(rows: Sequence[Sequence[str]], indent: str = "", right: int | None = None) -> str:
    """Rows as columns of even width; the column `right` is aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = widths[-1] if right == len(widths) - 1 else 0
    cells = [
        [
            cell.rjust(width) if place == right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join((indent + "  ".join(line)).rstrip() for line in cells)


def _size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count} bytes"
