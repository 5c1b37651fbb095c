"""Choosing: request order, lists, strictness, pins, plugins, the decision record, logging, agreement of ranks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch import Tensor

from glm5_port import backends, flags, plugins, registry, requests, selection
from glm5_port.errors import FlagError, SelectionError
from glm5_port.registry import PORTABLE
from glm5_port.requests import use_backend

FACTS = {"device_type": "cpu", "dtype": torch.float32}


@pytest.fixture
def same(declare, chip, set_flags):
    """An operator with a portable implementation, two of a usable chip and one of a chip that is missing."""

    def same(x: Tensor) -> Tensor:
        return x.clone()

    operator = declare(same)
    chip("here")
    chip("away", missing="its driver is not installed")
    operator.implement(PORTABLE, variant="eager", differentiable=True)(lambda x: x.clone())
    operator.implement("here", variant="plain", rank=20)(lambda x: x.clone())
    operator.implement(
        "here", variant="quick", rank=10, not_supported=lambda *, dtype, **_: [] if dtype != torch.float64 else ["no float64"]
    )(lambda x: x.clone())
    operator.implement("away", variant="quick")(lambda x: x.clone())
    return operator


def reasons(chosen) -> dict[str, str]:
    return {c.id: "; ".join(c.reasons) for c in chosen.candidates}


def refusal(operator, **options) -> str:
    with pytest.raises(SelectionError) as raised:
        operator.select(**FACTS, **options)
    return str(raised.value)


def pin(operator) -> str:
    return f"GLM5_PORT_OP_{operator.name.upper()}"


# -- order of the request ----------------------------------------------------------------------------------------------


def test_auto_takes_the_best_rank_of_a_usable_chip(same):
    chosen = same.select(**FACTS)
    assert chosen.chosen.id == "here/quick"
    assert chosen.request.source == "default"
    assert reasons(chosen) == {
        "here/quick": "",
        "here/plain": "outranked by here/quick",
        "away/quick": "its driver is not installed",
        "torch/eager": "outranked by here/quick",
        "reference": "runs only when asked for by name",
    }


def test_each_level_beats_the_next_and_says_so(same, set_flags):
    set_flags(GLM5_PORT_BACKEND="away")
    assert "away: its driver is not installed" in refusal(same)

    set_flags(GLM5_PORT_BACKEND="away", **{pin(same): "plain"})
    pinned = same.select(**FACTS)
    assert (pinned.chosen.id, pinned.request.source, pinned.request.overridden) == (
        "here/plain",
        pin(same),
        ("GLM5_PORT_BACKEND=away",),
    )

    with use_backend("cpu"):
        in_context = same.select(**FACTS)
        assert (in_context.chosen.id, in_context.request.source) == ("torch/eager", "use_backend")
        assert in_context.request.overridden == (f"{pin(same)}=plain", "GLM5_PORT_BACKEND=away")

        argument = same.select(**FACTS, backend="here")
        assert (argument.chosen.id, argument.request.source) == ("here/quick", "backend")
        assert argument.request.overridden == ("use_backend=cpu", f"{pin(same)}=plain", "GLM5_PORT_BACKEND=away")
    assert "overrides use_backend=cpu" in str(argument)
    assert same.select(**FACTS).chosen.id == "here/plain"


def test_use_backend_nests_and_restores(same):
    with use_backend("here"):
        with use_backend("cpu"):
            assert same.select(**FACTS).chosen.id == "torch/eager"
        assert same.select(**FACTS).chosen.id == "here/quick"
    assert requests.requested_context() is None
    with pytest.raises(FlagError, match=r"use_backend=heer: no such backend; did you mean here\?"), use_backend("heer"):
        pass


def test_direct_calls_follow_the_context(same):
    x = torch.ones(2)
    picked = []
    same.implement("here", variant="seen", rank=1)(lambda x: picked.append("here") or x.clone())
    same(x)
    with use_backend("cpu"):
        same(x)
    assert picked == ["here"]


def test_a_list_takes_the_first_usable(same, set_flags):
    set_flags(GLM5_PORT_BACKEND="away, here")
    chosen = same.select(**FACTS)
    assert chosen.chosen.id == "here/quick"
    assert reasons(chosen)["away/quick"] == "its driver is not installed"
    assert requests.resolve_backend().name == "here"


def test_no_usable_backend_gives_every_reason(same, set_flags, chip):
    chip("gone", missing="not plugged in")
    with pytest.raises(SelectionError) as raised:
        requests.resolve_backend("away,gone")
    text = str(raised.value)
    assert "backend=away,gone: no requested backend is usable" in text
    assert "away: its driver is not installed" in text
    assert "gone: not plugged in" in text
    assert "usable here: here, cpu" in text


def test_tensors_never_change_device(same, chip):
    chip("other", device_type="meta")
    text = refusal(same, backend="other")
    assert "tensors are on cpu, other was asked for (tensors never change device)" in text


def test_implementations_of_another_device_are_refused(same, chip):
    chip("other", device_type="meta")
    same.implement("other", variant="native")(lambda x: x.clone())
    assert reasons(same.select(**FACTS))["other/native"] == "tensors are on cpu, other computes on meta"


def test_reasons_of_the_implementation_itself(same):
    chosen = same.select(device_type="cpu", dtype=torch.float64)
    assert chosen.chosen.id == "here/plain"
    assert reasons(chosen)["here/quick"] == "no float64"


def test_an_implementation_without_its_backend_is_a_visible_row(same):
    same.implement("nowhere", variant="x")(lambda x: x.clone())
    assert reasons(same.select(**FACTS))["nowhere/x"] == "its backend 'nowhere' is not registered"


# -- strict and pins ---------------------------------------------------------------------------------------------------


def test_strict_refuses_portable_implementations(same, set_flags):
    set_flags(GLM5_PORT_STRICT="1", GLM5_PORT_BACKEND="cpu")
    text = refusal(same)
    assert "GLM5_PORT_STRICT=1 refuses portable implementations" in text
    assert "NOTHING FITS" in text
    set_flags(GLM5_PORT_STRICT="1")
    assert same.select(**FACTS).chosen.id == "here/quick"


@pytest.mark.parametrize(
    ("value", "chosen"), [("plain", "here/plain"), ("here/plain", "here/plain"), ("torch/eager", "torch/eager")]
)
def test_pins(same, set_flags, value, chosen):
    set_flags(**{pin(same): value})
    record = same.select(**FACTS)
    assert record.chosen.id == chosen
    assert reasons(record)["here/quick"] == f"not asked for ({pin(same)}={value})"


def test_the_reference_runs_when_asked_for_by_name(same, set_flags):
    set_flags(GLM5_PORT_STRICT="1", **{pin(same): "reference"})
    assert same.select(**FACTS).chosen.id == "reference"


def test_a_variant_that_two_chips_have_takes_the_usable_one(same, set_flags):
    set_flags(**{pin(same): "quick"})
    assert same.select(**FACTS).chosen.id == "here/quick"


def test_a_pin_that_names_nothing(same, set_flags):
    set_flags(**{pin(same): "quik"})
    with pytest.raises(FlagError, match=rf"{pin(same)}=quik: .* has no such implementation; did you mean quick\?"):
        same.select(**FACTS)


def test_a_pin_that_cannot_run_is_an_error(same, set_flags):
    set_flags(**{pin(same): "away/quick"})
    text = refusal(same)
    assert "away/quick   its driver is not installed" in text
    set_flags(**{pin(same): "here/quick"})
    with pytest.raises(SelectionError, match="no float64"):
        same.select(device_type="cpu", dtype=torch.float64)


# -- the record --------------------------------------------------------------------------------------------------------


def test_record_as_text_and_data(same):
    record = same.select(**FACTS, phase="decode")
    lines = str(record).splitlines()
    assert lines[0] == f"{same.name}: here/quick   asked for auto (default)"
    assert lines[1].split() == ["->", "here/quick", "chosen"]
    data = json.loads(json.dumps(record.as_dict()))
    assert data["chosen"] == "here/quick"
    assert data["facts"]["dtype"] == "float32"
    assert data["facts"]["phase"] == "decode"
    assert [c["id"] for c in data["candidates"]][0] == "here/quick"
    assert {c["id"]: c["chosen"] for c in data["candidates"]} == {i: i == "here/quick" for i in same.implementations}


def test_error_text_is_the_record_with_the_facts(same):
    text = refusal(same, backend="away")
    assert text.startswith(f"{same.name}: NOTHING FITS   asked for away (backend)")
    assert "facts: device_type=cpu, dtype=float32, needs_grad=False" in text
    for implementation in same.implementations:
        assert implementation in text


def test_as_backend_answers_without_the_chip(same, chip):
    record = same.select(**FACTS, as_backend="away")
    assert record.chosen.id == "away/quick"
    assert record.hypothetical == "away"
    assert "as if away were here" in record.title
    chip("new", missing="x", device_type="meta")
    record = same.select(**FACTS, as_backend="new")
    assert (record.chosen.id, record.facts["device_type"]) == ("torch/eager", "meta")
    with pytest.raises(FlagError, match="as=nwe: no such backend; did you mean new"):
        same.select(**FACTS, as_backend="nwe")


def test_every_built_in_chip_has_an_answer(set_flags):
    for name in backends.BUILT_IN:
        record = registry.OPERATORS["rms_norm"].select(**FACTS, width=8, as_backend=name)
        assert record.chosen is not None
        assert record.facts["device_type"] == registry.BACKENDS[name].device_type
        probe = requests.probe(name)
        assert (probe.missing is None) == (name == "cpu") or probe.missing is None  # a missing one says what is missing
        assert probe.missing is None or len(probe.missing) > 10


def test_what_auto_may_choose_ends_with_the_cpu(set_flags):
    assert [b.name for b in requests.search_order() if not b.by_name_only][-1] == "cpu"
    assert [b.name for b in requests.usable_backends() if not b.by_name_only][-1] == "cpu"


# -- logging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "lines"), [("quiet", 0), ("once", 1), ("trace", 2)])
def test_logging_modes(same, set_flags, caplog, mode, lines):
    set_flags(GLM5_PORT_LOG=mode)
    with caplog.at_level(logging.INFO, logger="glm5_port"):
        same.select(**FACTS)
        same.select(**FACTS)
    assert len(caplog.records) == lines
    if mode == "once":
        assert caplog.records[0].getMessage() == same.select(**FACTS).title
    if mode == "trace":
        assert "outranked by here/quick" in caplog.records[0].getMessage()


def test_a_portable_choice_on_an_accelerator_warns_with_the_whole_record(same, chip, caplog):
    chip("accelerator", device_type="meta")
    with caplog.at_level(logging.INFO, logger="glm5_port"):
        same.select(device_type="meta", dtype=torch.float32, backend="accelerator")
    assert caplog.records[0].levelno == logging.WARNING
    assert "runs only when asked for by name" in caplog.records[0].getMessage()


def test_choices_digest_follows_the_choices(same):
    first, second = same.select(**FACTS), registry.OPERATORS["rms_norm"].select(**NORM_FACTS)
    digest = selection.choices_digest([first, second])
    assert selection.choices_digest([second, same.select(**FACTS), second]) == digest
    assert len({digest, selection.choices_digest([first]), selection.choices_digest([second])}) == 3


# -- plugins -----------------------------------------------------------------------------------------------------------

PLUGIN = """
from glm5_port.registry import BACKENDS, Backend, Probe, register_backend
from glm5_port.operators import rms_norm

def _chip(name):
    register_backend(Backend(name, name, "cpu", None, "gloo", 50, lambda: Probe(None), origin="plugin"))

def good():
    _chip("goodchip")
    rms_norm.implement("goodchip", variant="kernel")(lambda x, weight, eps: x)

def half():
    _chip("halfchip")
    rms_norm.implement("halfchip", variant="kernel")(lambda x, weight, eps: x)
    rms_norm.implement("cpu", variant="stray", rank=1)(lambda x, weight, eps: x)
    raise RuntimeError("the vendor library is too old")
"""


@pytest.fixture
def installed_plugins(tmp_path, monkeypatch, set_flags):
    """Three installed plugins: one good, one whose module cannot be imported, one that fails half way."""
    (tmp_path / "glm5_test_plugin.py").write_text(PLUGIN)
    info = tmp_path / "glm5_test_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: glm5-test-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[glm5_port.backends]\ngood = glm5_test_plugin:good\n"
        "absent = glm5_no_such_module:register\nhalf = glm5_test_plugin:half\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {p.name for p in metadata.entry_points(group="glm5_port.backends")} >= {"good", "absent", "half"}
    known, implementations = dict(registry.BACKENDS), dict(registry.OPERATORS["rms_norm"].implementations)

    def forget():
        plugins.load_plugins.cache_clear()
        requests.probe.cache_clear()
        registry.OPERATORS["rms_norm"]._memo.clear()
        for table, before in ((registry.BACKENDS, known), (registry.OPERATORS["rms_norm"].implementations, implementations)):
            table.clear()
            table.update(before)
        sys.modules.pop("glm5_test_plugin", None)

    forget()
    yield
    forget()


NORM_FACTS = {**FACTS, "width": 8}


def test_good_and_broken_plugins(installed_plugins):
    record = registry.OPERATORS["rms_norm"].select(**NORM_FACTS)
    assert record.chosen.id == "goodchip/kernel"
    absent = requests.probe("absent").missing
    assert "plugin absent (glm5_no_such_module:register) failed to load: ModuleNotFoundError" in absent
    half = requests.probe("half").missing
    assert "RuntimeError: the vendor library is too old" in half
    assert "halfchip" not in registry.BACKENDS


def test_a_plugin_that_fails_half_way_leaves_nothing_that_runs(installed_plugins):
    operator = registry.OPERATORS["rms_norm"]
    operator.select(**NORM_FACTS)
    assert "cpu/stray" not in operator.implementations
    assert "halfchip/kernel" not in operator.implementations


def test_asking_for_a_broken_plugin_gives_its_reason(installed_plugins):
    with pytest.raises(SelectionError, match="half: plugin half .* the vendor library is too old"):
        registry.OPERATORS["rms_norm"].select(**NORM_FACTS, backend="half")


def test_plugins_flag(installed_plugins, set_flags, portable_only):
    set_flags(GLM5_PORT_PLUGINS="none")
    assert registry.OPERATORS["rms_norm"].select(**NORM_FACTS).chosen.id == "torch/eager"
    assert "absent" not in registry.BACKENDS


def test_plugins_flag_names_some(installed_plugins, set_flags):
    set_flags(GLM5_PORT_PLUGINS="good")
    assert registry.OPERATORS["rms_norm"].select(**NORM_FACTS).chosen.id == "goodchip/kernel"
    assert "half" not in registry.BACKENDS


def test_plugins_flag_with_an_unknown_name(installed_plugins, set_flags):
    set_flags(GLM5_PORT_PLUGINS="god")
    with pytest.raises(FlagError, match=r"plugin god is not installed; did you mean good\?"):
        registry.OPERATORS["rms_norm"].select(**NORM_FACTS)


# -- ranks and processes -----------------------------------------------------------------------------------------------

RANKS = """
import json, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import glm5_port
from glm5_port.operators import rms_norm
from glm5_port.selection import check_ranks_agree

def rank(number, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=number, world_size=2)
    facts = dict(device_type="cpu", dtype=torch.float32, width=8)
    check_ranks_agree([rms_norm.select(**facts)])
    queue.put("agree")
    dist.barrier()
    if number == 1:
        rms_norm.implement("cpu", variant="mine", rank=1)(lambda x, weight, eps: x)
    try:
        check_ranks_agree([rms_norm.select(**facts)])
        queue.put("silent")
    except glm5_port.errors.RankMismatchError as error:
        queue.put(str(error))
    dist.destroy_process_group()

context = mp.get_context("fork")
queue = context.SimpleQueue()
ranks = [context.Process(target=rank, args=(number, sys.argv[1], queue)) for number in range(2)]
[process.start() for process in ranks]
[process.join(60) for process in ranks]
vendors = ["torch_npu", "torch_mlu", "torch_musa", "torch_gcu", "triton", "transformers", "onnxruntime"]
print(json.dumps([queue.get() for _ in range(4)]))
print(json.dumps([name for name in vendors if name in sys.modules]))
"""


def test_ranks_that_differ_stop_and_no_vendor_package_is_imported(tmp_path):
    """One process for both: two forked gloo ranks, and what `import glm5_port` brought in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(flags.PREFIX)} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, vendors = (json.loads(line) for line in done.stdout.splitlines())
    assert sorted(told)[:2] == ["agree", "agree"]
    mismatches = [text for text in told if text != "agree"]
    assert len(mismatches) == 2
    own = registry.OPERATORS["rms_norm"].select(**NORM_FACTS).chosen.id  # of this machine's instruction set
    for text in mismatches:
        assert text.startswith("ranks chose differently for rms_norm (device_type=cpu")
        assert f"rank 0: {own}\n  rank 1: cpu/mine" in text
    assert vendors == []


def test_agreement_does_nothing_without_a_process_group():
    selection.check_ranks_agree([])


def test_a_child_gets_the_same_flags(same, set_flags):
    set_flags(GLM5_PORT_BACKEND="cpu", **{pin(same): "plain"})
    before = same.select(**FACTS)
    set_flags(**flags.current().environment())
    after = same.select(**FACTS)
    assert (after.chosen, after.request) == (before.chosen, before.request)


def test_a_child_decides_as_its_parent_did(set_flags):
    set_flags(GLM5_PORT_LOG="quiet", GLM5_PORT_OP_RMS_NORM="reference")
    assert requests.child_environment() == {
        "GLM5_PORT_LOG": "quiet",
        "GLM5_PORT_OP_RMS_NORM": "reference",
        "GLM5_PORT_BACKEND": requests.resolve_backend().name,
    }
