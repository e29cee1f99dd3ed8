from types import FunctionType

import pytest
import torch

from ranks import ranks


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # Also fills every uninitialised tensor, C++ allocations included, with NaN or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Marks what starts the processes of a group, which costs seconds each: tests or helpers that call ranks()."""
    for item in items:
        if isinstance(item, pytest.Function):
            named = [item.function.__globals__.get(name) for name in item.function.__code__.co_names]
            if any(map(_calls_ranks, [item.function, *named])):
                item.add_marker("ranks")


def _calls_ranks(f):
    return isinstance(f, FunctionType) and f.__globals__.get("ranks") is ranks and "ranks" in f.__code__.co_names
