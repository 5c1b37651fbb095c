"""These tests need TRITON_INTERPRET=1 from the start of the process, and then no kernel can be compiled: an ordinary run leaves
them out, and `make test-interpreter` (part of `make test`) runs them."""

from __future__ import annotations

from typing import Any

from glm5_port.backends.cuda.triton_support import interpreted
from tests.interpreter.patch_once import patch_once

collect_ignore_glob = [] if interpreted() else ["*"]


def let_scalars_count() -> None:
    """Triton 3.6's interpreter holds scalars as arrays of one number, and takes `int` of them where a loop has a bound that is
    not constant; numpy 2.4 refuses that. Its own patch of tensors is extended by an index that works with both."""
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if interpreted():
    let_scalars_count()
    patch_once()
