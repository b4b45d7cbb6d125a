"""Shared by all tests: tiny models made once, warnings of transformers kept quiet."""

import functools
import os

import pytest
import torch

from mmcompress.testing import tiny_model

if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` runs one worker per core
    torch.set_num_threads(1)

_model = functools.lru_cache(maxsize=None)(tiny_model)


@pytest.fixture
def tiny():
    """tiny(family) -> the session's model of that family, checked to come back without a wrapper."""
    used = []

    def get(family: str):
        model = _model(family)
        used.append(model)
        return model

    yield get
    for model in used:
        model.eval()
        model.zero_grad(set_to_none=True)
        left = [f"{name}.{k}" for name, m in model.named_modules() for k in ("forward", "generate") if k in m.__dict__]
        if left:
            _model.cache_clear()
            pytest.fail(f"a test left {left} on the model")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
