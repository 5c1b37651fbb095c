"""Every environment flag: name, grammar, default, help. This is the only place that reads `GLM5_PORT_*`.

Flags are read once, at the first choice, and are then constant for the process: a flag changed later would silently
not take effect on operators that are bound already. An unknown `GLM5_PORT_*` name or a value outside the grammar raises
`FlagError` with the nearest valid name. docs/flags.md is generated from this file (`glm5-port flags --markdown`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from glm5_port.errors import FlagError, did_you_mean

PREFIX = "GLM5_PORT_"
OPERATOR_PREFIX = PREFIX + "OP_"


@dataclass(frozen=True, slots=True)
class Flag:
    """One environment variable.

    Attributes:
        name: the variable's full name.
        grammar: what a value looks like, for people.
        default: the value used when the variable is unset or empty.
        help: one or two sentences.
        choices: the accepted values, or empty when the value is checked against a registry later.
    """

    name: str
    grammar: str
    default: str
    help: str
    choices: tuple[str, ...] = ()


BACKEND = Flag(
    PREFIX + "BACKEND",
    "auto | NAME[,NAME...]",
    "auto",
    "The backend that computes, and where the model is put. A list means the first usable one; if none is usable that is "
    "an error with each reason. `auto` is the first usable accelerator in the order that `glm5-port doctor` prints, else cpu.",
)
STRICT = Flag(
    PREFIX + "STRICT",
    "0 | 1",
    "0",
    "1 refuses the portable PyTorch implementations, so that only a backend's own kernels may run.",
    ("0", "1"),
)
LOG = Flag(
    PREFIX + "LOG",
    "quiet | once | trace",
    "once",
    "`once` logs one line for each operator and chosen implementation, `trace` logs the whole decision record of every "
    "choice, `quiet` logs nothing. Lines go to the Python logger `glm5_port`.",
    ("quiet", "once", "trace"),
)
PLUGINS = Flag(
    PREFIX + "PLUGINS",
    "all | none | NAME[,NAME...]",
    "all",
    "Which installed plugins (entry-point group `glm5_port.backends`) are loaded.",
)
CPU_ISA = Flag(
    PREFIX + "CPU_ISA",
    "auto | scalar | avx2 | avx512 | avx512_bf16 | amx",
    "auto",
    "The widest instruction set that the native CPU kernels may use; `auto` is the widest that this machine has. `scalar` runs "
    "the readable specification of each kernel, which is slow.",
    ("auto", "scalar", "avx2", "avx512", "avx512_bf16", "amx"),
)
ONNXRUNTIME_PROVIDER = Flag(
    PREFIX + "ONNXRUNTIME_PROVIDER",
    "NAME[,NAME...]",
    "CPUExecutionProvider",
    "The execution providers of the backend `onnxruntime`, in the order in which they are asked for a node. What none of them "
    "computes is an error: ONNX Runtime's own fallback to CPUExecutionProvider is off unless that provider is named too.",
)
OPERATOR = Flag(
    OPERATOR_PREFIX + "<OPERATOR>",
    "VARIANT | BACKEND/VARIANT | reference",
    "",
    "Pins one operator to one implementation, for example `GLM5_PORT_OP_SPARSE_MLA_ATTENTION=triton`. A pinned "
    "implementation that cannot run is an error; nothing else is tried.",
)
FLAGS: tuple[Flag, ...] = (BACKEND, STRICT, LOG, PLUGINS, CPU_ISA, ONNXRUNTIME_PROVIDER)


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of one process, validated.

    Attributes:
        backend: value of `GLM5_PORT_BACKEND`.
        strict: value of `GLM5_PORT_STRICT`.
        log: value of `GLM5_PORT_LOG`.
        plugins: value of `GLM5_PORT_PLUGINS`.
        cpu_isa: value of `GLM5_PORT_CPU_ISA`.
        onnxruntime_provider: value of `GLM5_PORT_ONNXRUNTIME_PROVIDER`.
        pins: operator name -> value of `GLM5_PORT_OP_<OPERATOR>`.
        given: names of the flags that were set, as opposed to defaulted.
    """

    backend: str = BACKEND.default
    strict: bool = False
    log: str = LOG.default
    plugins: str = PLUGINS.default
    cpu_isa: str = CPU_ISA.default
    onnxruntime_provider: str = ONNXRUNTIME_PROVIDER.default
    pins: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def environment(self) -> dict[str, str]:
        """The environment that reproduces these flags in a child process or another rank."""
        settings = {
            BACKEND.name: self.backend,
            STRICT.name: str(int(self.strict)),
            LOG.name: self.log,
            PLUGINS.name: self.plugins,
            CPU_ISA.name: self.cpu_isa,
            ONNXRUNTIME_PROVIDER.name: self.onnxruntime_provider,
        }
        return settings | {OPERATOR_PREFIX + name.upper(): value for name, value in self.pins.items()}


def read(environ: Mapping[str, str], operators: frozenset[str]) -> Flags:
    """Validates every `GLM5_PORT_*` variable of `environ`. Pure: touches neither the process nor its cache.

    Args:
        environ: the environment to read.
        operators: the names of all declared operators; each has a `GLM5_PORT_OP_<NAME>` flag.

    Raises:
        FlagError: for an unknown name, or a value outside a flag's grammar.
    """
    by_name = {flag.name: flag for flag in FLAGS}
    pin_flags = {OPERATOR_PREFIX + operator.upper(): operator for operator in operators}
    values: dict[str, str] = {}
    pins: dict[str, str] = {}
    for name, raw in environ.items():
        if not name.startswith(PREFIX):
            continue
        value = raw.strip()
        if name in pin_flags:
            if value:
                pins[pin_flags[name]] = value
            continue
        if name not in by_name:
            known = [*sorted(by_name), OPERATOR.name]
            raise FlagError(f"unknown flag {name}{did_you_mean(name, [*by_name, *pin_flags])}\n  known flags: {', '.join(known)}")
        flag = by_name[name]
        if value and flag.choices and value not in flag.choices:
            raise FlagError(f"{name}={raw}: no such value{did_you_mean(value, flag.choices)}\n  supported: {flag.grammar}")
        if value:
            values[name] = value
    return Flags(
        backend=values.get(BACKEND.name, BACKEND.default),
        strict=values.get(STRICT.name, STRICT.default) == "1",
        log=values.get(LOG.name, LOG.default),
        plugins=values.get(PLUGINS.name, PLUGINS.default),
        cpu_isa=values.get(CPU_ISA.name, CPU_ISA.default),
        onnxruntime_provider=values.get(ONNXRUNTIME_PROVIDER.name, ONNXRUNTIME_PROVIDER.default),
        pins=pins,
        given=frozenset(values) | {OPERATOR_PREFIX + name.upper() for name in pins},
    )


_operators: set[str] = set()
_current: Flags | None = None
_generation = 0


def declare_operator(name: str) -> None:
    """Makes `GLM5_PORT_OP_<NAME>` a known flag. Called once by each operator's declaration."""
    _operators.add(name)


def current() -> Flags:
    """The flags of this process, read from the environment the first time this is called."""
    global _current
    if _current is None:
        _current = read(os.environ, frozenset(_operators))
    return _current


def reset() -> None:
    """Forgets the flags, so that the next choice reads the environment again. For tests and interactive sessions;
    operators and models that are bound already keep their implementations."""
    global _current, _generation
    _current = None
    _generation += 1


def generation() -> int:
    """How often `reset` was called: a memo of choices holds for one generation."""
    return _generation
