"""Makes Triton's interpreter faster by more than half: it exchanges every function of `triton.language` for its own again with
each call of one kernel function by another, hundreds of times a program. Once for each launch is enough."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Exchanges them once for each launch and each module (`triton.language`, `triton.language.core`) that a function names."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    named: dict[Any, frozenset[int]] = {}
    patched: set[frozenset[int]] = set()

    def languages(function: Any) -> frozenset[int]:
        if function not in named:
            named[function] = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        return named[function]

    def at_launch(function: Any) -> Any:
        patched.clear()
        patched.add(languages(function))
        return patch(function)

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        if languages(self.fn) not in patched:
            patch(self.fn)
            patched.add(languages(self.fn))
        try:
            return self.rewrite()(*arguments, **more)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = at_launch
    interpreter.InterpretedFunction.__call__ = call
