"""What every test starts from: one seed, and a heap of modules that is not searched for garbage again and again."""

import gc

import pytest
import torch
from hypothesis import settings

settings.register_profile("plait", deadline=None, derandomize=True)  # a shared machine is slow at times
settings.load_profile("plait")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)
