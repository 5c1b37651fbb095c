"""The fake devices of the tests index as tensors do, and still find host syncs and device literals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fake_devices import fake_devices

DEVICES = pytest.mark.parametrize("device", ["cuda", "xpu"])


@DEVICES
@pytest.mark.parametrize(
    "key",
    [0, slice(1, None), slice(None, None, 2), None, ..., (..., 0), (slice(None), None, 1), (0, ..., None),
     ("index",), ("index", "index"), (slice(None), "index"), (..., "index"), (None, "index", slice(1, 3)),
     ("index", None, ...), (1, "index")],
    ids=str,
)  # fmt: skip
def test_indexing_gives_the_shapes_of_real_tensors(device: str, key: Any) -> None:
    def on(where: str) -> torch.Tensor:
        index = torch.zeros(2, 2, dtype=torch.int64, device=where)
        filled = tuple(index if isinstance(k, str) else k for k in key) if isinstance(key, tuple) else key
        return torch.zeros(3, 4, 5, device=where)[filled]

    with fake_devices():
        assert on(device).shape == on("cpu").shape


@DEVICES
def test_host_syncs_and_device_literals_raise(device: str) -> None:
    with fake_devices():
        x = torch.ones(3, device=device)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x[torch.zeros((), dtype=torch.int64, device=device)]
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)
        x[1:] = 2.0
        assert (~(x > 1)).device.type == device
