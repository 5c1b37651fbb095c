"""A checkpoint on disk: opened by its headers, checked as a whole, read one tensor at a time.

Weights are bf16, fp16, fp32 or block-FP8 safetensors, in one file or in shards. Nothing is skipped by name: every stored tensor
must belong to the model, or to the MTP layer that config.json announces. (Old Llama checkpoints carry `rotary_emb.inv_freq`; no
GLM-5 checkpoint does, so such a tensor is reported like any other stranger.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, did_you_mean
from glm5_port.memory import zeros
from glm5_port.model.block_fp8 import dequantize_rows, scale_name
from glm5_port.model.checkpoint_check import differences
from glm5_port.model.stored_tensors import FP8, StoredTensor, StoredTensors, read_directory
from glm5_port.model.tensors import TensorSpec, layer_prefix

READ_BYTES = 64 * 2**20
"""Memory for one block of rows on its way into a tensor, in float32: what reading costs beside the result."""

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint. `open` reads headers only; `check` says whether the model can be read from it.

    Attributes:
        path: the directory.
        config: its config.json.
        generation_config: its generation_config.json, empty if there is none.
        stored: what the weight files hold.
    """

    path: Path
    config: Glm5Config
    generation_config: Mapping[str, Any]
    stored: StoredTensors
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Checkpoint:
        """Opens the directory of a checkpoint.

        Raises:
            ConfigError: when its config.json is missing, broken or of another architecture.
            CheckpointError: when it holds no weights, or no readable index.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory\n  expected: the directory of a checkpoint, with config.json and weights"
            )
        return cls(directory, Glm5Config.from_json(directory), _generation_config(directory), read_directory(directory))

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name, multipliers of FP8 weights included."""
        return self.stored.tensors

    @property
    def has_mtp(self) -> bool:
        """Whether tensors of the MTP layer are stored, needed or not."""
        layer = self.config.mtp_layer
        return layer is not None and any(name.startswith(layer_prefix(layer)) for name in self.tensors)

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The token ids that generation_config.json ends a text with; None if it does not say."""
        ids = self.generation_config.get("eos_token_id")
        if ids is None:
            return None
        return tuple(ids) if isinstance(ids, list) else (ids,)

    def check(self, expected: Mapping[str, TensorSpec]) -> None:
        """Compares the files with what a model needs: names, shapes and dtypes, both ways. Allocates nothing.

        Args:
            expected: from `expected_tensors`. Stored tensors of the MTP layer may be left out of it; asked for, they must exist.

        Raises:
            CheckpointError: one error that names everything that is missing, unexpected or of the wrong shape or dtype, and
                every missing, truncated or contradictory file.
        """
        if found := differences(expected, self.stored, self.config):
            raise CheckpointError(
                "\n  ".join([f"{self.path} does not hold this model ({len(expected):,} tensors expected)", *found])
            )

    def tensor(self, name: str, dtype: torch.dtype, cut: tuple[int, int, int] | None = None) -> Tensor:
        """Reads one tensor, or a part of it, into memory of its own, on the CPU.

        Block-FP8 is multiplied out on the way. Rows are read in blocks, so that beside the result at most `READ_BYTES` are
        taken however large the tensor is.

        Args:
            name: as in the checkpoint.
            dtype: of the result.
            cut: (dimension 0 or 1, first, size) of the part; None: all of it.

        Raises:
            CheckpointError: when the tensor is not there or its file cannot be read.
        """
        stored = self._stored(name)
        block = self._block(name) if stored.dtype == FP8 else None
        scales = None if block is None else self._whole(scale_name(name))
        axis, start, size = cut or (0, 0, stored.shape[0] if stored.shape else 0)
        shape = tuple(size if cut and dimension == axis else of for dimension, of in enumerate(stored.shape))
        wanted = range(start, start + size) if axis == 0 else range(stored.shape[0])
        result = zeros(*shape, dtype=dtype)
        try:
            source = self._file(stored.file).get_slice(name)
            multiple = 1 if block is None else block[0]
            for first, last in _row_blocks(stored.shape, multiple):
                begin, end = max(first, wanted.start), min(last, wanted.stop)
                if begin >= end:
                    continue
                whole = begin // multiple * multiple  # a block's multiplier serves all of its rows
                rows = source[whole:end] if axis == 0 or block is not None else source[whole:end, start : start + size]
                if block is not None and scales is not None:
                    upper, lower = whole // block[0], -(-end // block[0])
                    rows = dequantize_rows(rows, scales[upper:lower], block, dtype)[begin - whole :]
                    rows = rows if axis == 0 else rows[:, start : start + size]
                result[begin - wanted.start : end - wanted.start] = rows
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {name} from {self.path / stored.file}: {error}") from error
        return result

    def iterate(self, names: Iterable[str], dtype: torch.dtype, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Reads tensors one after the other. Keep none, and no more than one is in memory.

        Args:
            names: which tensors, in the order wanted.
            dtype: of the results.
            progress: called after each tensor.

        Yields:
            (name, tensor).
        """
        names = list(names)
        total, done = sum(self._stored(name).bytes for name in names), 0
        for name in names:
            yield name, self.tensor(name, dtype)
            done += self._stored(name).bytes
            if progress is not None:
                progress(done, total)

    def close(self) -> None:
        """Lets go of the files. Tensors that were read stay valid; reading another opens its file again."""
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}{did_you_mean(name, self.tensors)}")
        return self.tensors[name]

    def _block(self, name: str) -> tuple[int, int]:
        if self.config.quantization is None:
            raise CheckpointError(f"{name} is stored as FP8, but {self.path / 'config.json'} has no quantization_config")
        return self.config.quantization.block

    def _whole(self, name: str) -> Tensor:
        """A small tensor in its stored dtype, as float32."""
        stored = self._stored(name)
        try:
            tensor: Tensor = self._file(stored.file).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {name} from {self.path / stored.file}: {error}") from error
        return tensor.to(torch.float32)

    def _file(self, name: str) -> Any:
        """The opened file: opening parses its header, which is too slow to repeat for each of thousands of experts."""
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt", device="cpu")
        return self._files[name]


def _row_blocks(shape: tuple[int, ...], multiple: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit `READ_BYTES` in float32 (values, multipliers and product), each but the last a multiple of
    `multiple`."""
    rows = shape[0]
    row_bytes = 3 * 4 * max(1, torch.Size(shape[1:]).numel())
    step = max(1, READ_BYTES // row_bytes // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _generation_config(directory: Path) -> dict[str, Any]:
    file = directory / "generation_config.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected an object")
    return content
