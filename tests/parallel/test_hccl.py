"""The buffer that Ascend's fused exchange needs, told by the commands of a plan."""

from __future__ import annotations

import pytest

from glm5_port.config import released
from glm5_port.parallel.plan import Layout
from glm5_port.parallel.recipes import emit, hccl_buffer
from tests.parallel.questions import two_a2_servers

GLM5 = released("GLM-5")


@pytest.mark.parametrize(
    ("expert", "rows", "megabytes"),
    [(16, 64, 196 + 4), (32, 64, 388), (16, 256, 772), (256, 64, 388), (8, 1, 200)],
    ids=["default is enough", "32 ranks", "256 rows", "one expert a rank", "small"],
)
def test_hccl_buffer(expert: int, rows: int, megabytes: int) -> None:
    """By hand: 64 rows * 32 ranks * 8 choices * 6144 * 2 bytes are 192 MiB; twice that and twice 2 MiB are 388."""
    assert hccl_buffer(Layout(data=expert, expert=expert), rows, GLM5) == megabytes


def test_commands_tell_it() -> None:
    asked, plan = two_a2_servers(max_sequences=512)
    for command in emit(plan, asked.topology, asked.config, "vllm-ascend"):
        assert command.environment["HCCL_BUFFSIZE"] == "1540"
