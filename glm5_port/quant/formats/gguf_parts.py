"""GGUF files: one, or parts as `llama-gguf-split` makes them, which llama.cpp loads when it is given the first.

A model that fits into one shard is `model.gguf`; otherwise part i of n is `model-<i>-of-<n>.gguf`, each a GGUF file of its own
with `split.no`, `split.count` and `split.tensors.count`; the model's metadata and tokenizer are in the first. A part holds whole
tensors, so a stack of experts is never torn apart.

Source: `llama_model_loader` of llama.cpp (src/llama-model-loader.cpp): it forms the names of the other parts from that of the
first, and counts parts and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import FLOATS, StoredTensor, StoredTensors
from glm5_port.quant.formats.gguf_model import KV_B, check_model, is_wide, model_metadata, piece_of
from glm5_port.quant.formats.gguf_tokenizer import tokenizer_metadata, why_left_out
from glm5_port.quant.gguf_file import (
    KINDS,
    GgufHeader,
    GgufTensor,
    Int32,
    UInt16,
    Value,
    header,
    read_header,
    shown_value,
    stored_value,
)
from glm5_port.quant.output_files import Facts, Kept, OutputTensor, Place, PlannedTensor, Shard, fill

PACKED_DTYPE = "U8"
"""Dtype of a piece in blocks of Q4_0: [rows, bytes of a row]."""
INDEX_WIDTH = 64
"""llama.cpp's indexer takes multiples of it, and aborts on others."""
_PART = re.compile(r"model-(\d{5})-of-(\d{5})\.gguf")


class GgufParts:
    """Files of glm-dsa."""

    def kept(self, name: str, stored: StoredTensor, config: Glm5Config) -> Kept:
        """A tensor as it is, norms, biases and routers in float32, kv_b_proj as the two matrices of the absorbed attention, the
        key's transposed.

        Raises:
            InputError: glm-dsa has no such tensor, or GGUF no such dtype.
        """
        piece = piece_of(name)
        if piece is None and not name.endswith(KV_B):
            raise InputError(
                f"gguf: {name} has no place in llama.cpp's glm-dsa, and nothing is dropped unsaid\n"
                "  Use a format that carries every tensor, or remove it from the source"
            )
        if stored.dtype not in FLOATS:
            raise InputError(f"gguf: {name} is stored as {stored.dtype}; expected {', '.join(FLOATS)}")
        if piece is None:
            return _split_heads(name, stored, config)
        if not is_wide(piece, stored.shape) or stored.dtype == "F32":
            return Kept((OutputTensor(piece, stored.dtype, stored.shape, stored.bytes),))
        return Kept((OutputTensor.of(piece, "F32", stored.shape),), lambda rows: {piece: rows.to(torch.float32)})

    def lay_out(self, tensors: Sequence[PlannedTensor], facts: Facts) -> tuple[Shard, ...]:
        """Parts of whole tensors, in the order of the layers."""
        check_model(facts.config)
        groups: dict[tuple[str, ...], list[PlannedTensor]] = {}
        for tensor in tensors:
            groups.setdefault(tuple(_tensor_of(output.name) for output in tensor.outputs), []).append(tensor)
        parts = fill(list(groups.values()), facts.max_shard_bytes)
        count = sum(len(names) for names in groups)
        mtp = any(tensor.mtp for tensor in tensors)
        return tuple(_part(number, len(parts), count, part, facts, mtp) for number, part in enumerate(parts))

    def texts(self, shards: Sequence[Shard], facts: Facts) -> dict[str, bytes]:
        """None."""
        return {}

    def notes(self, facts: Facts) -> list[str]:
        """Why there is no tokenizer in the file, if there is none, and what llama.cpp does not compute yet."""
        notes = []
        if facts.source is not None and (reason := why_left_out(facts.source / "tokenizer.json")) is not None:
            notes.append(f"no tokenizer goes into the GGUF file, which then takes token ids: {reason}")
        if (width := facts.config.index_head_dim) % INDEX_WIDTH:
            notes.append(
                f"index heads are {width} wide, and llama.cpp (of llama-cpp-python 0.3.36) aborts where that is no multiple of "
                f"{INDEX_WIDTH}"
            )
        return notes

    def read(self, directory: Path) -> StoredTensors:
        """The pieces of all parts. A missing part is a fault, and so is one that counts otherwise than its name."""
        found = sorted(file.name for file in directory.glob("*.gguf"))
        if not found:
            raise CheckpointError(f"{directory} holds no weights\n  expected: model.gguf, or its parts")
        numbers = [part for file in found if (part := _PART.fullmatch(file))]
        if len({part[2] for part in numbers}) > 1 or len(numbers) not in (0, len(found)):
            raise CheckpointError(f"{directory} holds parts of several models: {', '.join(found)}")
        files = _names(int(numbers[0][2])) if numbers else found
        stored, count = StoredTensors(files=tuple(files)), 0
        headers: list[GgufHeader] = []
        for file in files:
            try:
                headers.append(read_header(directory / file))
            except CheckpointError as error:
                stored.faults.append(f"{file}: {error}")
                continue
            size = (directory / file).stat().st_size
            if size != headers[-1].bytes:
                state = "truncated" if size < headers[-1].bytes else "longer than it should be"
                stored.faults.append(f"{file} is {state}: {size:,} bytes, its header describes {headers[-1].bytes:,}")
            count += len(headers[-1].tensors)
            for tensor, first in headers[-1].tensors.items():
                _add(stored, tensor, file, first)
        if len(files) > 1 and len(headers) == len(files):
            stored.faults += _split_faults(headers, files, count)
        return stored

    def problems(self, directory: Path, stored: StoredTensors, facts: Facts) -> list[str]:
        """Metadata that is not that of config.json and of the tokenizer beside it."""
        if not stored.files:
            return []
        try:
            there = read_header(directory / stored.files[0]).metadata
        except CheckpointError:
            return []  # told by `read`
        last = facts.config.mtp_layer
        mtp = last is not None and any(name.startswith(f"blk.{last}.") for name in stored.tensors)
        wanted = {key: stored_value(value) for key, value in _metadata(facts, mtp).items()}
        there = {key: value for key, value in there.items() if not key.startswith("split.")}
        return [
            f"{stored.files[0]}: {key} is {shown_value(there.get(key))}; config.json and the tokenizer make it "
            f"{shown_value(wanted.get(key))}"
            for key in sorted({*wanted, *there})
            if wanted.get(key) != there.get(key)
        ]

    def is_here(self, directory: Path) -> bool:
        """Any GGUF file."""
        return any(directory.glob("*.gguf"))


# -- laying out ----------------------------------------------------------------------------------------------------------


def _split_heads(name: str, stored: StoredTensor, config: Glm5Config) -> Kept:
    """attn_k_b [heads, latent, nope] and attn_v_b [heads, value, latent] from kv_b_proj [heads * (nope + value), latent]."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    block = f"blk.{name.split('.')[2]}."
    key_name, value_name = f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"

    def convert(rows: Tensor) -> Mapping[str, Tensor]:
        per_head = rows.view(-1, nope + value, latent)
        return {key_name: per_head[:, :nope].transpose(1, 2), value_name: per_head[:, nope:]}

    outputs = (
        OutputTensor.of(key_name, stored.dtype, (heads, latent, nope)),
        OutputTensor.of(value_name, stored.dtype, (heads, value, latent)),
    )
    return Kept(outputs, convert, multiple=nope + value)


def _part(number: int, parts: int, tensors: int, planned: Sequence[PlannedTensor], facts: Facts, mtp: bool) -> Shard:
    """One file."""
    stacks: dict[str, list[OutputTensor]] = {}
    for tensor in planned:
        for output in tensor.outputs:
            stacks.setdefault(_tensor_of(output.name), []).append(output)
    metadata = _metadata(facts, mtp) if number == 0 else {}
    if parts > 1:
        split = {"no": UInt16(number), "count": UInt16(parts), "tensors.count": Int32(tensors)}
        metadata |= {f"split.{key}": value for key, value in split.items()}
    data, firsts, size = header(metadata, [_entry(name, stack) for name, stack in stacks.items()])
    places = {
        output.name: Place(first + index * stack[0].bytes)
        for first, stack in zip(firsts, stacks.values(), strict=True)
        for index, output in enumerate(stack)
    }
    return Shard(_names(parts)[number], tuple(planned), {0: data}, places, size)


def _entry(name: str, stack: Sequence[OutputTensor]) -> GgufTensor:
    """The tensor that pieces make up; experts must be alike and in order."""
    if stack[0].name == name:
        return _shaped(name, stack[0].dtype, stack[0].shape)
    kinds = {(output.dtype, output.shape) for output in stack}
    if len(kinds) > 1:
        stored = ", ".join(sorted("Q4_0" if dtype == PACKED_DTYPE else dtype for dtype, _ in kinds))
        raise InputError(
            f"gguf: {name}: its experts would be stored in {stored}; a stack has one dtype\n"
            "  Quantise all experts of a layer's projection, or none"
        )
    if [output.name for output in stack] != [f"{name}[{expert}]" for expert in range(len(stack))]:
        raise InputError(f"gguf: {name}: its experts are not 0 to {len(stack) - 1} in order")
    return _shaped(name, stack[0].dtype, (len(stack), *stack[0].shape))


def _shaped(name: str, dtype: str, shape: tuple[int, ...]) -> GgufTensor:
    if dtype != PACKED_DTYPE:
        return GgufTensor(name, dtype, shape)
    _, elements, size = KINDS["Q4_0"]
    return GgufTensor(name, "Q4_0", (*shape[:-1], shape[-1] // size * elements))


def _tensor_of(piece: str) -> str:
    """The tensor of the file that a piece belongs to."""
    return piece.partition("[")[0]


def _names(parts: int) -> list[str]:
    return ["model.gguf"] if parts == 1 else [f"model-{number:05}-of-{parts:05}.gguf" for number in range(1, parts + 1)]


def _metadata(facts: Facts, mtp: bool) -> dict[str, Value]:
    """The name is that of the family member: the bytes of an export do not depend on where it was made."""
    tokenizer = {} if facts.source is None else tokenizer_metadata(facts.source / "tokenizer.json", facts.config)
    return model_metadata(facts.config, facts.config.family_member, mtp=mtp) | tokenizer


# -- reading -------------------------------------------------------------------------------------------------------------


def _add(stored: StoredTensors, tensor: GgufTensor, file: str, first: int) -> None:
    """The pieces of a tensor: every expert of a stack, or itself."""
    dtype, shape = tensor.kind, tensor.shape
    if tensor.kind == "Q4_0":
        _, elements, size = KINDS["Q4_0"]
        dtype, shape = PACKED_DTYPE, (*shape[:-1], shape[-1] // elements * size)
    whole = StoredTensor(shape, dtype, file, tensor.bytes, first)
    pieces = {tensor.name: whole}
    if tensor.name.endswith("_exps.weight") and len(shape) == 3:
        each = tensor.bytes // max(shape[0], 1)
        one = replace(whole, shape=shape[1:], bytes=each)
        pieces = {f"{tensor.name}[{expert}]": replace(one, start=first + expert * each) for expert in range(shape[0])}
    for name, piece in pieces.items():
        if name in stored.tensors:
            stored.faults.append(f"{name} is stored twice: in {stored.tensors[name].file} and in {file}")
        stored.tensors.setdefault(name, piece)


def _split_faults(headers: Sequence[GgufHeader], files: Sequence[str], tensors: int) -> list[str]:
    """What parts say of themselves, which llama.cpp compares."""
    wanted: dict[str, Value] = {"split.count": UInt16(len(files)), "split.tensors.count": Int32(tensors)}
    faults = []
    for number, (file, found) in enumerate(zip(files, headers, strict=True)):
        for key, value in {"split.no": UInt16(number), **wanted}.items():
            if found.metadata.get(key) != stored_value(value):
                faults.append(f"{file}: {key} is {shown_value(found.metadata.get(key))}; expected {value}")
    return faults
