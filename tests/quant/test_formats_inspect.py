"""inspect of every format: the same codes, the same parts of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm5_port.quant.export import export
from glm5_port.quant.inspection import inspect_checkpoint
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.plan import Options
from tests.quant.exports import expert, plain_quantize, read_all, write_source

NAME = expert(2, 1, "down")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "modelslim"])
def test_codes_and_parts(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source")
    export(source, tmp_path / "out", Options(format=name, rule=Int4Rule("amax7", -1), mtp="bf16"))
    found = inspect_checkpoint(tmp_path / "out", NAME)
    weight = read_all(source)[NAME]
    codes, scales = plain_quantize(weight, weight.shape[1])
    assert found["format"].startswith(name)
    assert found["quantized_weights"] == 36
    assert found["problems"] == []
    tensor = found["tensor"]
    assert (tensor["shape"], tensor["group_size"]) == (list(weight.shape), weight.shape[1])
    assert tensor["first_codes"] == codes[0, :16].tolist()
    assert tensor["codes"] == {str(code): int((codes == code).sum()) for code in range(-8, 8)}
    assert tensor["scales"]["largest"] == float(scales.max())
    experts = [part for part in found["components"] if part["component"] == "routed experts"]
    assert [(part["stored"], part["weights"]) for part in experts] == [("INT4", 36)]
    assert not any("not known" in part["component"] for part in found["components"])
