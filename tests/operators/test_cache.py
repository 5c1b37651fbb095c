"""The paged cache: where tokens lie, every layout byte by byte, and what write_cache promises."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.operators import cache_layouts
from glm5_port.operators.cache import (
    LAYOUTS,
    CacheField,
    CacheLayout,
    cache_layout,
    gather_rows,
    locate_tokens,
    register_layout,
    slots_at,
    write_cache,
)
from tests.operators.doors import BOTH, compiled, function_of, on_absent_device

ALL_LAYOUTS = [(kind, name) for kind in ("latent", "index") for name in ("plain", "fp8", "int8")]
EVERY_LAYOUT = pytest.mark.parametrize(("kind", "name"), ALL_LAYOUTS)
WIDTHS = {"latent": [512, 64], "index": [128]}


def rows_of(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, width, generator=generator).to(dtype) for width in WIDTHS[kind]]


def e4m3(code: int) -> float:
    """One e4m3 byte by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3_VALUES = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)


def numbers(data: bytes, form: str) -> list[float]:
    return list(struct.unpack(f"<{len(data) // struct.calcsize(form)}{form}", data))


def bfloat16(data: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]


def as_bytes(field: Tensor) -> bytes:
    return field.contiguous().view(torch.uint8).numpy().tobytes()


# -- where a token lies ------------------------------------------------------------------------------------------------


def test_tokens_are_located() -> None:
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    sequences, positions = locate_tokens(starts, torch.tensor([9, 4, 3], dtype=torch.int32), 7)
    assert sequences.tolist() == [0, 0, 2, 2, 2, 0, 0]
    assert positions.tolist() == [7, 8, 0, 1, 2, -1, -1]
    assert sequences.dtype == positions.dtype == torch.int64
    assert [t.tolist() for t in locate_tokens(starts, torch.tensor([9, 4, 3]), 0)] == [[], []]


def test_slots_follow_the_block_table_and_survive_positions_outside_it() -> None:
    table = torch.tensor([[7, 2], [5, 2**31 - 1]], dtype=torch.int32)
    slots = slots_at(table, torch.tensor([0, 1]), torch.tensor([[0, 2, 3, 5], [1, -1, 100, 2**31 - 1]]), 3)
    assert slots[0].tolist() == [21, 23, 6, 8]
    assert slots[1, 0] == 16
    rows = gather_rows(cache_layout("index", "plain"), [torch.zeros(8, 3, 2)], slots)
    assert rows[0].shape == (2, 4, 2)


# -- layouts, byte by byte ---------------------------------------------------------------------------------------------


def test_e4m3_codes_are_those_of_the_definition() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(cache_layouts.from_e4m3(codes, torch.float64), E4M3_VALUES, rtol=0, atol=0, equal_nan=True)
    finite = codes[~E4M3_VALUES.isnan()]
    assert torch.equal(cache_layouts.to_e4m3(cache_layouts.from_e4m3(finite, torch.float32)), finite)
    rounded = cache_layouts.to_e4m3(torch.tensor([1e9, -1e9, 460.0, 1.0625, 1.1875, torch.nan]))
    assert E4M3_VALUES[rounded.long()][:5].tolist() == [448.0, -448.0, 448.0, 1.0, 1.25]  # ties go to even
    assert E4M3_VALUES[rounded.long()][5].isnan()


def test_latent_fp8_bytes() -> None:
    latent, rope_key = rows_of("latent", 1)
    (field,) = cache_layout("latent", "fp8").encode([latent, rope_key])
    assert field.shape == (1, 656)
    assert field.dtype == torch.uint8
    data = as_bytes(field[0])
    scales = numbers(data[512:528], "f")
    for group in range(4):
        values = latent[0, group * 128 : group * 128 + 128]
        assert scales[group] == (values.abs().max() / 448).item()
        codes = torch.tensor(list(data[group * 128 : group * 128 + 128]))
        nearest = (E4M3_VALUES.nan_to_num(math.inf)[None] - (values / scales[group]).double()[:, None]).abs().amin(-1)
        off = (E4M3_VALUES[codes] - (values / scales[group]).double()).abs()
        assert torch.equal(off, nearest), "a value is not rounded to the nearest code"
        assert E4M3_VALUES[codes].abs().max() == 448
    assert bfloat16(data[528:656]) == rope_key[0].bfloat16().tolist()


def test_latent_int8_bytes() -> None:
    latent, rope_key = rows_of("latent", 1)
    (field,) = cache_layout("latent", "int8").encode([latent, rope_key])
    assert field.shape == (1, 656)
    assert field.dtype == torch.int8
    data = as_bytes(field[0])
    assert bfloat16(data[512:640]) == rope_key[0].bfloat16().tolist()
    scales = numbers(data[640:656], "f")
    for group in range(4):
        values = latent[0, group * 128 : group * 128 + 128]
        assert scales[group] == (values.abs().max() / 127).item()
        codes = numbers(data[group * 128 : group * 128 + 128], "b")
        assert codes == (values / scales[group]).round().tolist()
        assert max(map(abs, codes)) == 127


def test_index_fp8_fields() -> None:
    (key,) = rows_of("index", 3)
    key[1, 0] = 448.0  # amax / 448 is a power of two
    key[2, 0] = 449.0
    values, scale = cache_layout("index", "fp8").encode([key])
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (torch.uint8, torch.float32, (3, 128), (3, 1))
    expected = [2.0 ** math.ceil(math.log2(amax / 448)) for amax in key.double().abs().amax(-1).tolist()]
    assert scale[:, 0].tolist() == expected
    assert expected[1:] == [1.0, 2.0]
    codes = E4M3_VALUES[values.long()]
    assert ((codes - key / scale).abs() <= (key / scale).abs() / 16 + 2.0**-10).all()


def test_index_fp8_scale_is_exact_at_every_power_of_two() -> None:
    powers = torch.tensor([448 * 2.0**e for e in range(-20, 60)])
    above = torch.nextafter(powers, torch.full_like(powers, math.inf))
    assert torch.equal(cache_layouts.power_of_two_scale(powers), powers / 448)
    assert torch.equal(cache_layouts.power_of_two_scale(above), powers / 224)


def test_index_int8_fields() -> None:
    (key,) = rows_of("index", 3)
    values, scale = cache_layout("index", "int8").encode([key])
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (torch.int8, torch.float16, (3, 128), (3, 1))
    assert torch.equal(scale, (key.abs().amax(-1, keepdim=True) / 127).half())
    assert torch.equal(values.float(), (key / scale.float()).round())


@EVERY_LAYOUT
def test_rows_read_back(kind: str, name: str) -> None:
    layout = cache_layout(kind, name)
    rows = rows_of(kind, 5, torch.bfloat16)
    error = {"plain": 0.0, "fp8": 1 / 16, "int8": 1 / 127}[name]
    for place, (row, read) in enumerate(zip(rows, layout.decode(layout.encode(rows)), strict=True)):
        assert read.dtype == (torch.bfloat16 if name == "plain" else torch.float32)
        limit = error * row.abs().amax(-1, keepdim=True).float() if place == 0 else torch.tensor(0.0)  # rope keys are exact
        assert ((read.float() - row.float()).abs() <= limit).all()
    wide = layout.decode(layout.encode(rows), torch.float64)
    assert all(row.dtype == torch.float64 for row in wide)


@EVERY_LAYOUT
def test_bytes_do_not_depend_on_the_dtype_of_the_rows(kind: str, name: str) -> None:
    layout = cache_layout(kind, name)
    rows = rows_of(kind, 3, torch.bfloat16)
    for mine, wide in zip(layout.encode(rows), layout.encode([row.double() for row in rows]), strict=True):
        assert layout.exact or torch.equal(mine, wide)


@EVERY_LAYOUT
def test_zero_tiny_and_huge_rows(kind: str, name: str) -> None:
    layout = cache_layout(kind, name)
    rows = [torch.stack((torch.zeros(width), torch.full((width,), 1e-7), torch.full((width,), 3e38))) for width in WIDTHS[kind]]
    if name == "int8" and kind == "index":
        rows[0][2] = 8e6  # the float16 scale ends at 65504 * 127
    for read, row in zip(layout.decode(layout.encode(rows)), rows, strict=True):
        assert (read[0] == 0).all()
        assert ((read[1] - row[1]).abs() <= 1e-6).all()
        assert ((read[2] - row[2]).abs() <= row[2].abs() / 15).all()


@pytest.mark.parametrize(("kind", "name"), [pair for pair in ALL_LAYOUTS if pair[1] != "plain"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_makes_its_group_nan_and_no_other(kind: str, name: str, bad: float) -> None:
    layout = cache_layout(kind, name)
    rows = rows_of(kind, 2)
    rows[0][1, 5] = bad
    first, *rest = layout.decode(layout.encode(rows))
    assert first[1, :128].isnan().all()
    assert first[0].isfinite().all()
    assert first[1, 128:].isfinite().all()
    assert all(part.isfinite().all() for part in rest)


def test_a_key_beyond_the_float16_scale_reads_as_nan() -> None:
    layout = cache_layout("index", "int8")
    (read,) = layout.decode(layout.encode([torch.full((1, 128), 1e7)]))
    assert read.isnan().all()


def test_bytes_per_token() -> None:
    expected = {("latent", "plain"): 1152, ("latent", "fp8"): 656, ("latent", "int8"): 656}
    expected |= {("index", "plain"): 256, ("index", "fp8"): 132, ("index", "int8"): 130}
    for (kind, name), count in expected.items():
        layout = cache_layout(kind, name)
        assert layout.bytes_per_token(WIDTHS[kind], torch.bfloat16) == count
        fields = layout.allocate(3, 4, WIDTHS[kind], torch.bfloat16)
        assert sum(field.numel() * field.element_size() for field in fields) == 3 * 4 * count
        assert all(field.shape[:2] == (3, 4) and not field.any() for field in fields)


# -- write_cache -------------------------------------------------------------------------------------------------------


@BOTH
@EVERY_LAYOUT
def test_only_the_named_rows_are_written(variant: str, kind: str, name: str) -> None:
    layout = cache_layout(kind, name)
    wider = [torch.cat((f, f), dim=0) for f in layout.allocate(3, 5, WIDTHS[kind], torch.float32)]
    for field in wider:
        field.view(torch.uint8).fill_(0xA5)
    before = [field.clone() for field in wider]
    views = [field[1::2] for field in wider]  # pages 1, 3 and 5: a cache may be a view
    rows = rows_of(kind, 4)
    function_of(write_cache, variant)(rows, views, torch.tensor([11, -1, 0, 14]), cache_format=name)
    read = gather_rows(layout, views, torch.tensor([11, 0, 14]))
    for mine, exact in zip(read, layout.decode(layout.encode([row[[0, 2, 3]] for row in rows])), strict=True):
        assert torch.equal(mine, exact)
    for field, old in zip(wider, before, strict=True):
        changed = (field.view(torch.uint8) != old.view(torch.uint8)).any(-1)
        assert not changed[::2].any()
        assert set(changed[1::2].flatten().nonzero().flatten().tolist()) <= {0, 11, 14}


@BOTH
@pytest.mark.parametrize("slots", [[-1, -1, -1], [-1, 0, -1], [0, -1, -1]])
def test_padding_never_disturbs_slot_zero(variant: str, slots: list[int]) -> None:
    cache = [torch.full((2, 2, 3), 9.0)]
    row = torch.arange(9.0).view(3, 3)
    function_of(write_cache, variant)([row], cache, torch.tensor(slots), cache_format="plain")
    kept = [row[i] for i, slot in enumerate(slots) if slot == 0]
    assert torch.equal(cache[0][0, 0], kept[0] if kept else torch.full((3,), 9.0))
    assert (cache[0].flatten(0, 1)[1:] == 9.0).all()


@BOTH
@pytest.mark.parametrize("slots", [[3, -1, 0, -1], [-1, -1, -1, -1], [-1, 2, -1, -1]])
def test_gradients_reach_the_rows_and_the_rows_written_before(variant: str, slots: list[int]) -> None:
    write = function_of(write_cache, variant)
    earlier, rows = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    cache = [torch.zeros(2, 2, 2)]
    write([earlier], cache, torch.tensor([0, 1, 2, 3]), cache_format="plain")
    write([rows], cache, torch.tensor(slots), cache_format="plain")
    upstream = torch.randn(4, 2)
    cache[0].flatten(0, 1).backward(upstream)
    for slot in range(4):
        assert torch.equal(earlier.grad[slot], torch.zeros(2) if slot in slots else upstream[slot])
    for token, slot in enumerate(slots):
        assert torch.equal(rows.grad[token], upstream[slot] if slot >= 0 else torch.zeros(2))


def arguments(kind: str, name: str) -> dict[str, Any]:
    cache = cache_layout(kind, name).allocate(3, 5, WIDTHS[kind], torch.float32)
    return {"rows": rows_of(kind, 4), "cache": cache, "slots": torch.tensor([11, -1, 0, 14]), "cache_format": name}


@EVERY_LAYOUT
def test_no_host_sync(kind: str, name: str) -> None:
    on_absent_device(write_cache, arguments(kind, name))


@pytest.mark.parametrize(("kind", "name"), [("latent", "fp8"), ("index", "fp8"), ("index", "plain")])
def test_compiles_as_one_graph_and_writes(kind: str, name: str) -> None:
    compiled_call, expected = arguments(kind, name), arguments(kind, name)
    compiled(write_cache, compiled_call)
    write_cache.reference(**expected)
    assert all(torch.equal(a, b) for a, b in zip(compiled_call["cache"], expected["cache"], strict=True))
    assert any(field.any() for field in compiled_call["cache"])


def test_mutation_is_declared() -> None:
    assert "Tensor(a1!)[] cache" in str(write_cache.torch_op._schema)


@BOTH
def test_what_does_not_fit_is_refused(variant: str) -> None:
    write = function_of(write_cache, variant)
    given = arguments("latent", "plain")
    with pytest.raises(InputError, match=r"no such layout.*did you mean fp8\?"):
        write(**{**given, "cache_format": "fp8_"})
    with pytest.raises(InputError, match="656-byte row holds a latent of 512 and a rope key of 64"):
        write([torch.zeros(1, 128), torch.zeros(1, 64)], given["cache"], torch.tensor([0]), cache_format="fp8")
    for wrong in (
        {"slots": torch.tensor([0])},
        {"cache": given["cache"][:1]},
        {"cache": [given["cache"][0], given["cache"][1][..., :1]]},
        {"cache_format": "fp8"},  # plain fields under another name
    ):
        with pytest.raises(InputError, match="do not fit"):
            write(**given | wrong)
    with pytest.raises(InputError, match="3 tensors in rows"):
        write([torch.zeros(1, 1)] * 3, given["cache"], torch.tensor([0]), cache_format="plain")


def test_a_backend_can_register_its_own_layout() -> None:
    field = CacheField("latent_and_rope", None, sum)
    layout = CacheLayout(
        "latent",
        "joined",
        (field,),
        lambda rows: [torch.cat(tuple(rows), dim=-1)],
        lambda fields, dtype: list(fields[0].to(dtype).split([512, 64], dim=-1)),
        exact=True,
    )
    register_layout(layout)
    try:
        cache = layout.allocate(2, 3, [512, 64], torch.float32)
        rows = rows_of("latent", 2)
        write_cache(rows, cache, torch.tensor([4, 1]), cache_format="joined")
        assert all(torch.equal(a, b) for a, b in zip(gather_rows(layout, cache, torch.tensor([4, 1])), rows, strict=True))
        with pytest.raises(InputError, match="taken: plain, fp8, int8, joined"):
            register_layout(layout)
    finally:
        del LAYOUTS[("latent", "joined")]
