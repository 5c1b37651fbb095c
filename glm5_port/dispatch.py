"""How a call reaches the chosen implementation.

    Operator   the declaration: reference function, facts, fake, weights, mutated arguments, budget
    Bound      an implementation chosen once, on static facts; what layers hold and call

Two doors. In eager mode a bound operator calls its implementation directly. While something traces (torch.compile,
torch.export, fake tensors) the same call goes to an opaque `torch.library` op of that implementation, so that graphs name
what will run; with gradients a differentiable implementation is inlined instead, since an opaque op would lose them.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port import flags
from glm5_port.errors import GradientError, InputError, did_you_mean
from glm5_port.preparation import CanonicalWeights, Preparation
from glm5_port.registry import COMMON_FACTS, OPERATORS, PROMISES, REFERENCE, Budget, Implementation
from glm5_port.requests import request_token
from glm5_port.selection import Selection, select

_LIBRARY = torch.library.Library("glm5_port", "FRAGMENT")
_dispatch_stack = torch._C._len_torch_dispatch_stack  # > 0 under FakeTensorMode, make_fx and other dispatch modes
_trace_through = False
_defining = threading.Lock()


class Operator:
    """A declared operator. Calling it selects (with a memo) and runs; layers call `bind` once instead.

    Attributes:
        name: the reference function's name.
        reference: plain differentiable PyTorch, any device, any dtype up to float64. The meaning of the operator.
        facts: fact name -> function of the call's arguments (by name) that computes it. Static facts only: device, dtype,
            widths, layouts; never the batch or length of a call.
        fake: output shapes and dtypes from fake arguments.
        weights: names of the parameters that hold weights, which an implementation may prepare.
        mutates: names of the parameters written in place.
        budget: how far an implementation may be from the float64 gold. Cases live in `glm5_port.operators.cases`.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        *,
        budget: Budget,
        facts: Mapping[str, Callable[..., Any]],
        fake: Callable[..., Any] | None,
        weights: Sequence[str],
        mutates: Sequence[str],
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.__doc__ = reference.__doc__
        self.__module__ = reference.__module__
        self.facts = dict(facts)
        self.fake = fake or reference
        self.weights = tuple(weights)
        self.mutates = tuple(mutates)
        self.budget = budget
        self.signature = inspect.signature(reference)
        self.parameters = tuple(self.signature.parameters)
        self.implementations: dict[str, Implementation] = {}
        self._memo: dict[tuple[Any, ...], Bound] = {}
        if self.name in OPERATORS:
            raise InputError(f"operator {self.name} is declared twice")
        OPERATORS[self.name] = self
        flags.declare_operator(self.name)
        self.implement(REFERENCE, variant=REFERENCE, rank=1000, differentiable=True)(reference)
        self.torch_op = _define(
            self.name, torch.library.infer_schema(reference, mutates_args=self.mutates), self._select_and_run, self.fake
        )

    def __repr__(self) -> str:
        return f"<operator {self.name}{self.signature}>"

    # -- registering ---------------------------------------------------------------------------------------------------

    def implement(
        self,
        backend: str,
        *,
        variant: str,
        rank: int = 100,
        not_supported: Callable[..., list[str]] | None = None,
        differentiable: bool = False,
        promises: Sequence[str] = (),
        prepare: Callable[[Mapping[str, Any]], Preparation] | None = None,
        fake: Callable[..., Any] | None = None,
        yields: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers a function as `backend/variant`. See docs/adding-a-backend.md.

        Args:
            backend: a registered backend's name, or "torch" for a portable implementation.
            variant: names the technology ("triton", "aclnn", "amx", "eager").
            rank: order within the backend; lower is preferred.
            not_supported: `(**facts) -> list of reasons`; pure, needs no hardware; empty means yes.
            differentiable: gradients flow through the function by autograd.
            promises: names from `PROMISES`; each is held to by parity.
            prepare: `(facts) -> Preparation` for an implementation with a weight layout of its own; its function then takes
                what `finish()` returns in place of the declaration's weight parameters.
            fake: needed only when `prepare` is given and the declaration's fake reads a weight.
            yields: why the portable implementation goes first on this chip, for the record; empty where it comes last, as usual.

        Raises:
            InputError: parameter names differ from the declaration, the id is taken, or a promise is unknown.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._check_parameters(backend, variant, function, prepared=prepare is not None)
            if unknown := set(promises) - set(PROMISES):
                raise InputError(f"{self.name}: unknown promise {sorted(unknown)} (known: {', '.join(PROMISES)})")
            implementation = Implementation(
                operator=self,
                backend=backend,
                variant=variant,
                function=function,
                rank=rank,
                not_supported=not_supported or (lambda **_: []),
                differentiable=differentiable,
                promises=frozenset(promises),
                prepare=prepare,
                fake=fake or self.fake,
                yields=yields,
            )
            if implementation.id in self.implementations:
                raise InputError(f"{self.name}: {implementation.id} is registered twice")
            self.implementations[implementation.id] = implementation
            self._memo.clear()
            return function

        return register

    def _check_parameters(self, backend: str, variant: str, function: Callable[..., Any], *, prepared: bool) -> None:
        theirs = list(inspect.signature(function).parameters)
        ours = [name for name in self.parameters if not (prepared and name in self.weights)]
        if (theirs[: len(ours)] if prepared else theirs) != ours:
            raise InputError(
                f"{backend}/{variant} for {self.name}: parameters ({', '.join(theirs)}) "
                f"differ from the declaration ({', '.join(ours)}" + (", then the prepared weights)" if prepared else ")")
            )

    # -- choosing ------------------------------------------------------------------------------------------------------

    def complete_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """`facts` with the defaults of the common ones filled in; raises InputError for a missing or unknown fact."""
        known = {**COMMON_FACTS, **dict.fromkeys(self.facts, ...)}
        for name in facts:
            if name not in known:
                raise InputError(f"{self.name}: unknown fact {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        complete = known | dict(facts)
        if missing := [name for name, value in complete.items() if value is ...]:
            raise InputError(f"{self.name}: facts missing: {', '.join(missing)}")
        return complete

    def facts_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The static facts of a call: device, dtype and gradient need of its tensors, and the declaration's own facts."""
        tensors = list(_tensors(arguments.values()))
        first = next((t for t in tensors if t.is_floating_point()), tensors[0])
        common = {
            "device_type": first.device.type,
            "dtype": first.dtype,
            "needs_grad": torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        }
        return self.complete_facts(common | {name: fact(**arguments) for name, fact in self.facts.items()})

    def select(self, *, backend: str | None = None, as_backend: str | None = None, **facts: Any) -> Selection:
        """The decision record for these facts; raises SelectionError when nothing fits. See `glm5_port.selection.select`."""
        return select(self, self.complete_facts(facts), backend=backend, as_backend=as_backend)

    def bind(self, *, backend: str | None = None, **facts: Any) -> Bound:
        """Chooses once, on static facts, and returns what to call. Raises SelectionError when nothing fits."""
        return Bound(self.select(backend=backend, **facts))

    # -- calling -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (_dispatch_stack() and not _trace_through):
            if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors((*args, *kwargs.values()))):
                return self.reference(*args, **kwargs)  # selection cannot run inside a trace; the reference keeps gradients
            return self.torch_op(*args, **kwargs)
        return self._select_and_run(*args, **kwargs)

    def _select_and_run(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
        facts = self.facts_of(arguments)
        key = (request_token(), *facts.values())
        bound = self._memo.get(key)
        if bound is None:
            bound = self._memo[key] = Bound(select(self, facts, canonical=True))
        return bound.function(*args, **kwargs)


def operator(
    *,
    facts: Mapping[str, Callable[..., Any]] | None = None,
    fake: Callable[..., Any] | None = None,
    weights: Sequence[str] = (),
    mutates: Sequence[str] = (),
    budget: Budget = Budget(),
) -> Callable[[Callable[..., Any]], Operator]:
    """Declares an operator by its reference function. See `Operator` for the arguments."""
    return lambda reference: Operator(reference, facts=facts or {}, fake=fake, weights=weights, mutates=mutates, budget=budget)


class Bound:
    """An operator with its implementation chosen: a plain callable that layers hold.

    Attributes:
        selection: the decision record.
        implementation: what runs.
        function: what is called in eager mode; testing tools may wrap it to observe or replace calls.
    """

    __slots__ = ("_inference_only", "function", "implementation", "selection", "torch_op")

    def __init__(self, selection: Selection) -> None:
        self.rebind(selection)

    def rebind(self, selection: Selection) -> None:
        """Makes this binding run another selection."""
        if selection.chosen is None:
            raise InputError(f"cannot bind an empty selection:\n{selection}")
        self.selection = selection
        self.implementation = selection.chosen
        self.function = selection.chosen.function
        self.torch_op = _opaque_op(selection.chosen)
        self._inference_only = not selection.facts["needs_grad"]

    def __repr__(self) -> str:
        return f"<{self.implementation.operator.name} bound to {self.implementation.id}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self._inference_only:
            self._refuse_gradients((*args, *kwargs.values()))
        if torch.compiler.is_compiling() or _dispatch_stack():
            return self._traced(*args, **kwargs)
        return self.function(*args, **kwargs)

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        if _trace_through or not self._inference_only:
            return self.function(*args, **kwargs)  # bound for gradients: selection made sure that it is differentiable
        return self.torch_op(*args, **kwargs)

    def _refuse_gradients(self, values: Sequence[Any]) -> None:
        if any(t.requires_grad for t in _tensors(values)):
            raise GradientError(
                f"{self.implementation.operator.name} was bound for inference "
                f"(needs_grad=False, {self.implementation.id}) and got a tensor that requires a gradient.\n"
                "  Build the model with trainable=True, or call under torch.no_grad()."
            )

    def prepare(self) -> Preparation:
        """Where this binding's weights go while they stream in; `finish()` gives the keyword arguments to call it with."""
        if self.implementation.prepare is not None:
            return self.implementation.prepare(self.selection.facts)
        return CanonicalWeights(self.implementation.operator.weights, parts=self.selection.facts.get("experts"))


def _opaque_op(implementation: Implementation) -> Any:
    """The torch op of an implementation, defined the first time it is bound; threads may bind at the same time."""
    with _defining:
        return _defined_op(implementation)


def _defined_op(implementation: Implementation) -> Any:
    if implementation.torch_op is None:
        operator = implementation.operator
        variant = "" if implementation.backend == REFERENCE else f"_{implementation.variant}"
        name = re.sub(r"\W", "_", f"{operator.name}__{implementation.backend}{variant}")  # names of chips may hold a hyphen
        # The declaration's annotations are read, not the implementation's: only prepared weights change the parameters.
        annotated = operator.reference if implementation.prepare is None else implementation.function
        schema = torch.library.infer_schema(annotated, mutates_args=operator.mutates)
        implementation.torch_op = _define(name, schema, implementation.function, implementation.fake)
    return implementation.torch_op


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"glm5_port::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.glm5_port, name).default


@contextlib.contextmanager
def trace_through() -> Iterator[None]:
    """Within the context, dispatch modes (fake tensors, make_fx) see the body of the chosen implementation instead of its
    opaque op: to prove that it needs no host sync, or to export a graph of plain aten operators."""
    global _trace_through
    before, _trace_through = _trace_through, True
    try:
        yield
    finally:
        _trace_through = before


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
