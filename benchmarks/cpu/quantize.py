"""int4_quantize: a checkpoint's weights in bfloat16 become codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cpu.contest import Contest, copies_for
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.operators import int4_quantize, int4_quantize_measured

ROWS, WIDTH = 4096, 6144


def quantisers() -> Iterator[Contest]:
    """One expert's gate and up projections, with and without the statistics that an export reports."""
    copies = copies_for(2 * ROWS * WIDTH)
    weights = [torch.randn(ROWS, WIDTH).mul_(0.02).bfloat16() for _ in range(copies)]
    facts = {"device_type": "cpu", "dtype": torch.bfloat16, "width": WIDTH, "group_size": 32, "rule": "amax7"}
    for operator in (int4_quantize, int4_quantize_measured):
        native, portable = operator.bind(backend="cpu", **facts), operator.implementations["torch/eager"].function

        def with_weight(call: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], Tensor]:
            return lambda copy: call(weights[copy], group_size=32, rule="amax7")[0]

        yield Contest(
            operator=operator.name,
            work=f"{ROWS} x {WIDTH}, bfloat16",
            bytes=ROWS * WIDTH * 2,
            operations=0.0,
            kind="float32",
            contenders={f"cpu/{widest_isa()}": with_weight(native), "torch/eager (portable)": with_weight(portable)},
            copies=copies,
        )
