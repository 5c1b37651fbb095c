"""Binding at construction: every operator of a model is chosen once, on static facts, and can be listed or changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_port.dispatch import Bound, Operator
from glm5_port.errors import InputError, did_you_mean
from glm5_port.preparation import Preparation
from glm5_port.registry import OPERATORS
from glm5_port.requests import Request
from glm5_port.selection import Selection, select


class Binder:
    """Chooses operators for one model and remembers every binding.

    Args:
        backend: the backend= argument of the user, None when none was given; flags and contexts then decide.
        device: where its tensors are.
        dtype: its working dtype.
        trainable: whether gradients will be asked for.
        implementation: pins every operator to one implementation ("reference"), for comparisons; None chooses as usual.
        limits: the declared limits `max_tokens` and `max_context`.
        facts: operator name -> its static facts (`glm5_port.model.facts`).
    """

    def __init__(
        self,
        *,
        backend: str | None,
        device: torch.device,
        dtype: torch.dtype,
        trainable: bool,
        implementation: str | None,
        limits: Mapping[str, int],
        facts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.backend = backend
        self.request = None if implementation is None else Request(("auto",), implementation, "implementation argument")
        self.dtype = dtype
        self.common = {"device_type": device.type, "dtype": dtype, "needs_grad": trainable, **limits}
        self.facts = facts
        self.bindings: list[Bound] = []

    def __call__(self, operator: Operator, *, phase: str | None = None, **overrides: Any) -> Bound:
        """Binds `operator`; `overrides` are the facts that differ from layer to layer (such as a width)."""
        facts = operator.complete_facts({**self.common, "phase": phase, **self.facts[operator.name], **overrides})
        bound = Bound(select(operator, facts, backend=self.backend, request=self.request))
        self.bindings.append(bound)
        return bound

    def decisions(self) -> list[Selection]:
        """The decision record of every distinct binding, in the order of first use."""
        distinct: dict[tuple[Any, ...], Selection] = {}
        for bound in self.bindings:
            chosen = bound.implementation.id
            distinct.setdefault((bound.selection.operator, chosen, *map(str, bound.selection.facts.values())), bound.selection)
        return list(distinct.values())

    def rebind(self, operator: str, implementation: str) -> int:
        """Makes every binding of `operator` ("*" means all) run `implementation` ("backend/variant", "torch/eager",
        "reference").

        Returns:
            How many bindings changed.

        Raises:
            InputError: an operator that this model does not use, or an implementation whose weights are laid out differently.
            FlagError: an operator has no such implementation.
            SelectionError: the implementation cannot run on these facts. Whatever is raised, nothing has changed.
        """
        names = {bound.selection.operator for bound in self.bindings}
        if operator != "*" and operator not in names:
            near = did_you_mean(operator, names)
            state = "not used by this model" if operator in OPERATORS else f"no such operator{near}"
            raise InputError(f"rebind({operator!r}): {state}\n  used here: {', '.join(sorted(names))}")
        affected = [bound for bound in self.bindings if operator in ("*", bound.selection.operator)]
        selections = [self._pinned(bound, implementation) for bound in affected]
        for bound, selection in zip(affected, selections, strict=True):
            bound.rebind(selection)
        return len(affected)

    def _pinned(self, bound: Bound, implementation: str) -> Selection:
        operator = bound.implementation.operator
        request = Request(("auto",), implementation, "rebind")
        selection = select(operator, bound.selection.facts, request=request)
        chosen = selection.chosen
        if chosen is not None and (chosen.prepare or bound.implementation.prepare) and chosen is not bound.implementation:
            raise InputError(
                f"rebind({operator.name!r}, {implementation!r}): {bound.implementation.id} and {chosen.id} keep their weights in "
                f"different layouts\n  Load the model again with GLM5_PORT_OP_{operator.name.upper()}={implementation}."
            )
        return selection


class BoundLayer(torch.nn.Module):
    """A bound operator together with its weights in the layout that the chosen implementation wants.

    Weights stream in through `preparation` and are registered when `finish_loading` is called: as parameters while they are
    canonical (named as in the operator's declaration), as buffers where the implementation prepared its own layout.

    Attributes:
        bound: what is called.
        arguments: its weights, by the names of its parameters.
        transforms: weight -> the module it passes through on its way to the operator, in every call (`transform`).
    """

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.bound = bound
        self.arguments: dict[str, Any] = {}
        self.transforms: dict[str, torch.nn.Module] = {}
        self._names: tuple[str, ...] = ()
        self._constants: dict[str, Any] = {}
        self._preparation: Preparation | None = None

    @property
    def preparation(self) -> Preparation:
        if self._preparation is None:
            self._preparation = self.bound.prepare()
        return self._preparation

    def finish_loading(self, *, trainable: bool) -> None:
        """Registers the weights. One that is a parameter already stays that parameter: two layers may share it."""
        arguments = self.preparation.finish()
        self._preparation = None
        canonical = self.bound.implementation.prepare is None
        for name, value in arguments.items():
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, torch.Tensor) and canonical:
                self.register_parameter(name, torch.nn.Parameter(value, requires_grad=trainable))
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
        self._constants = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}
        self._names = tuple(arguments)
        self._collect()

    def transform(self, name: str, module: torch.nn.Module | None) -> None:
        """Lets the weight `name` pass through a module on its way to the operator, in every call; None: as it is again.

        The weight stays this layer's parameter under its own name; the module becomes the child `name + "_transform"`, so that
        parameters of its own are found.

        Raises:
            InputError: no such parameter. A weight in an implementation's own layout cannot be transformed.
        """
        if name not in self._parameters:
            raise InputError(
                f"{self.bound}: {name!r} is no canonical weight of it (those are: {', '.join(self._parameters) or 'none'}).\n"
                "  Build the model with trainable=True: implementations then take canonical weights."
            )
        child = f"{name}_transform"
        if self.transforms.pop(name, None) is not None:
            delattr(self, child)
        if module is not None:
            self.add_module(child, module)
            self.transforms[name] = module

    def _transformed(self) -> dict[str, Any]:
        return self.arguments | {name: module(self.arguments[name]) for name, module in self.transforms.items()}

    def _collect(self) -> None:
        self.arguments = {name: self._constants[name] if name in self._constants else getattr(self, name) for name in self._names}

    def _apply(self, fn: Any, recurse: bool = True) -> BoundLayer:
        super()._apply(fn, recurse)
        self._collect()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not nn.Module's __call__: hooks belong to the layers above, and a decode step makes hundreds of these calls.
        return self.bound(*args, **kwargs, **(self._transformed() if self.transforms else self.arguments))
