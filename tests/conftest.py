"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["TIMM_CONTCONV_MEASURE"] = (
    "0"  # read when the package is imported; tests of the engine measure when they say so
)

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of concurrent processes wait for one another
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of small operations, where threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
