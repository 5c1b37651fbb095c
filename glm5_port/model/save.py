"""Writes a model as a Hugging Face checkpoint: safetensors in shards, an index, config.json, and the small files of its source.

Weights stream, one tensor at a time; the directory appears under its name when everything is in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm5_port.errors import ExportError, Glm5PortError
from glm5_port.model.named_weights import DTYPES, NamedWeights
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.model.tensors import FLOAT32, TensorSpec, layer_prefix
from glm5_port.quant.config_text import with_entry, without_quantization
from glm5_port.quant.files import PART, as_bytes, copy_whole, sync_directory, write_whole
from glm5_port.quant.int4 import AMAX7
from glm5_port.quant.output_files import Facts, OutputTensor, PlannedTensor, Safetensors, Shard
from glm5_port.quant.plan import CARRY, DEFAULT_SHARD_BYTES
from glm5_port.quant.source_files import CONFIG, small_files
from glm5_port.quant.writing import OpenPiece, OpenShard

Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""How config.json calls it; the second is what transformers wrote before version 5."""


def save_checkpoint(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    source: str | PathLike[str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a trained model: what `load` reads back as the same bits, and transformers reads too.

    Args:
        model: this project's, built with trainable=True (transformers' own has `save_pretrained`, but is taken as well).
            Prepared for INT4-aware training it is written as its masters; learned scales are not among them
            (`glm5_port.quant.model_export` writes those).
        directory: must not exist, or be empty. It appears whole or not at all.
        dtype: of the weights; None is that of the model. The routers' correction biases are float32 always.
        source: the checkpoint that the model came from; None takes the one that `load` read, if any. Its config.json is kept
            letter by letter but for the dtype and a quantization_config, its tokenizer and other small files are copied, and
            what the model does not hold (an MTP layer that was not loaded, the indexers of a model with dense attention) is
            carried over. Without a source, an MTP layer that was not loaded is left out.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        progress: called after each tensor.

    Returns:
        The directory.

    Raises:
        InputError: a model or dtype that cannot be written, tensors that nobody holds, or NaN and infinity in a weight.
        ConfigError, CheckpointError: the source is no whole checkpoint of this model.
        ExportError: the directory holds something, or cannot be written.
    """
    weights = NamedWeights(model, source=source, dtype=dtype)
    tensors = [carried(name, spec, weights) for name, spec in weights.specs.items()]
    # The rule is only asked for by containers of quantised weights.
    facts = Facts(weights.config, AMAX7, max_shard_bytes, weights.source)
    container = Safetensors()
    shards = container.lay_out(tensors, facts)
    with new_directory(directory) as path:
        write_shards(path, shards, lambda tensor: [(tensor.name, weights.tensor(tensor.name))], progress)
        for file in () if weights.source is None else small_files(weights.source):
            copy_whole(file, path / file.name)
        for name, data in container.texts(shards, facts).items():
            write_whole(path / name, data)
        write_whole(path / CONFIG, config_text(weights).encode())
    return Path(directory)


# -- what model_export shares ------------------------------------------------------------------------------------------------


def carried(name: str, spec: TensorSpec, weights: NamedWeights) -> PlannedTensor:
    """A tensor that is written as floats."""
    output = OutputTensor.of(name, "F32" if spec.kind == FLOAT32 else DTYPES[weights.dtype], spec.shape)
    return PlannedTensor(
        name=name,
        action=CARRY,
        component=spec.component,
        mtp=name.startswith(layer_prefix(weights.config.num_hidden_layers)),
        source=StoredTensor(output.shape, output.dtype, "", output.bytes, 0),
        multipliers=None,
        outputs=(output,),
    )


def config_text(weights: NamedWeights) -> str:
    """config.json: that of the source, with the dtype that is written and without any quantisation."""
    if weights.source is not None:
        text = (weights.source / CONFIG).read_text(encoding="utf-8")
    else:
        text = json.dumps(weights.config.as_dict(), indent=2) + "\n"
    text = without_quantization(text)
    present = [key for key in _DTYPE_KEYS if key in json.loads(text)]
    for key in present or _DTYPE_KEYS[:1]:
        text = with_entry(text, key, str(weights.dtype).removeprefix("torch."))
    return text


@contextmanager
def new_directory(directory: str | PathLike[str]) -> Iterator[Path]:
    """A directory to write in, which gets its name when the block ends, and is removed when it fails.

    Raises:
        ExportError: something is there already, or it cannot be written.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{path} is there already\n  Nothing was changed. Choose a directory that does not exist or is empty")
    part = path.with_name(path.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        yield part
        os.replace(part, path)
        sync_directory(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, Glm5PortError):
            raise ExportError(f"cannot write {path}: {error.strerror or error}\n  Nothing is left of it") from error
        raise


def write_shards(
    path: Path,
    shards: Sequence[Shard],
    pieces: Callable[[PlannedTensor], Iterable[tuple[str, Tensor]]],
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Writes the files of weights, one tensor after the other.

    Args:
        path: directory.
        shards: of the layout.
        pieces: gives (name, whole tensor) of every piece of a planned tensor.
        progress: called after each planned tensor.

    Returns:
        shard -> bytes, sha256, and for each tensor the digest of its pieces.
    """
    total, done = sum(len(shard.tensors) for shard in shards), 0
    records: dict[str, dict[str, Any]] = {}
    for shard in shards:
        target = OpenShard(shard, path)
        try:
            hashes: dict[str, Mapping[str, str]] = {}
            for tensor in shard.tensors:
                hashes[tensor.name] = {name: _write(target, name, piece) for name, piece in pieces(tensor)}
                done += 1
                if progress is not None:
                    progress(done, total)
            records[shard.file] = {"bytes": shard.bytes, "sha256": target.close(), "tensors": hashes}
        except BaseException:
            target.abandon()
            raise
    return records


def _write(target: OpenShard, name: str, tensor: Tensor) -> str:
    piece = OpenPiece(target, name)
    piece.append(as_bytes(tensor))
    return piece.digest.hexdigest()
