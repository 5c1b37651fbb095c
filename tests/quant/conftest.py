"""Fixtures of the INT4 tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from glm5_port.testing.hugging_face import write_checkpoint
from glm5_port.testing.tiny import TINY
from tests.quant.qat_models import SMALL


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_checkpoint(tmp_path_factory.mktemp("hugging_face"), {**TINY, **SMALL})


@pytest.fixture
def theirs(transformers_model: Any) -> Any:
    return copy.deepcopy(transformers_model)
