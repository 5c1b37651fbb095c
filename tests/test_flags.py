"""Flags: grammar, suggestions, read once, and the environment that reproduces them."""

from __future__ import annotations

import pytest
import torch

from glm5_port import flags
from glm5_port.errors import FlagError
from glm5_port.operators import rms_norm
from glm5_port.registry import OPERATORS

FACTS = {"device_type": "cpu", "dtype": torch.float32, "width": 8}
NAMES = frozenset({"rms_norm", "rotate"})


def test_defaults_and_empty_values():
    assert flags.read({}, NAMES) == flags.Flags()
    empty = flags.read({flag.name: " " for flag in flags.FLAGS}, NAMES)
    assert empty == flags.Flags()
    assert empty.given == frozenset()


def test_all_values_are_read():
    read = flags.read(
        {
            "GLM5_PORT_BACKEND": "npu,cpu",
            "GLM5_PORT_STRICT": "1",
            "GLM5_PORT_LOG": "trace",
            "GLM5_PORT_PLUGINS": "none",
            "GLM5_PORT_OP_RMS_NORM": " eager ",
            "HOME": "/",
        },
        NAMES,
    )
    assert (read.backend, read.strict, read.log, read.plugins, dict(read.pins)) == (
        "npu,cpu",
        True,
        "trace",
        "none",
        {"rms_norm": "eager"},
    )
    assert read.given == {"GLM5_PORT_BACKEND", "GLM5_PORT_STRICT", "GLM5_PORT_LOG", "GLM5_PORT_PLUGINS", "GLM5_PORT_OP_RMS_NORM"}


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("GLM5_PORT_BACKND", "GLM5_PORT_BACKEND"),
        ("GLM5_PORT_STRIKT", "GLM5_PORT_STRICT"),
        ("GLM5_PORT_OP_RMS_NROM", "GLM5_PORT_OP_RMS_NORM"),
    ],
)
def test_unknown_flag_names_the_nearest(name, suggestion):
    with pytest.raises(FlagError, match=f"unknown flag {name}; did you mean {suggestion}") as raised:
        flags.read({name: "cpu"}, NAMES)
    assert "known flags: GLM5_PORT_BACKEND" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("GLM5_PORT_LOG", "onec", "did you mean once"),
        ("GLM5_PORT_STRICT", "yes", "supported: 0 | 1"),
        ("GLM5_PORT_STRICT", "2", "GLM5_PORT_STRICT=2: no such value"),
    ],
)
def test_value_outside_the_grammar(name, value, text):
    with pytest.raises(FlagError) as raised:
        flags.read({name: value}, NAMES)
    assert text in str(raised.value)


def test_unknown_backend_and_plugin_are_refused_at_the_first_choice(set_flags):
    set_flags(GLM5_PORT_BACKEND="cpuu")
    with pytest.raises(FlagError, match="GLM5_PORT_BACKEND=cpuu: no such backend; did you mean cpu"):
        rms_norm.select(**FACTS)


def test_suggestions_do_not_mind_capitals(set_flags):
    set_flags(GLM5_PORT_BACKEND="CPU")
    with pytest.raises(FlagError, match=r"GLM5_PORT_BACKEND=CPU: no such backend; did you mean cpu\?"):
        rms_norm.select(**FACTS)


def test_backend_list_with_auto_is_refused(set_flags):
    set_flags(GLM5_PORT_BACKEND="cpu,auto")
    with pytest.raises(FlagError, match="auto stands alone"):
        rms_norm.select(**FACTS)


def test_torch_is_not_a_backend(set_flags):
    set_flags(GLM5_PORT_BACKEND="torch")
    with pytest.raises(FlagError, match="is not a chip: pin an operator"):
        rms_norm.select(**FACTS)


def test_flags_are_read_once(set_flags, monkeypatch):
    set_flags(GLM5_PORT_STRICT="0")
    first = flags.current()
    monkeypatch.setenv("GLM5_PORT_STRICT", "1")
    monkeypatch.setenv("GLM5_PORT_NONSENSE", "1")
    assert flags.current() is first
    assert not flags.current().strict
    flags.reset()
    with pytest.raises(FlagError, match="GLM5_PORT_NONSENSE"):
        flags.current()


def test_reset_starts_a_new_generation(set_flags):
    before = flags.generation()
    set_flags()
    assert flags.generation() != before


def test_environment_reproduces_the_flags(set_flags):
    set_flags(GLM5_PORT_BACKEND="npu,cpu", GLM5_PORT_STRICT="1", GLM5_PORT_OP_RMS_NORM="eager", GLM5_PORT_LOG="quiet")
    here = flags.current()
    there = flags.read(here.environment(), frozenset(OPERATORS))
    assert (there.backend, there.strict, there.log, there.plugins, there.pins) == (
        here.backend,
        here.strict,
        here.log,
        here.plugins,
        here.pins,
    )


def test_every_flag_has_help_and_grammar():
    for flag in (*flags.FLAGS, flags.OPERATOR):
        assert flag.help.endswith(".")
        assert flag.grammar
        assert all(choice in flag.grammar for choice in flag.choices)
