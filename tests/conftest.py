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
    """Marks what starts the processes of a group, which costs seconds each: tests that call ranks()."""
    for item in items:
        if not isinstance(item, pytest.Function) or item.function.__globals__.get("ranks") is not ranks:
            continue
        if "ranks" in item.function.__code__.co_names:
            item.add_marker("ranks")
