"""What all tests share."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Read when the package is imported: only tests of the engine measure, and none touches the user's cache.
os.environ["TIMM_CONTCONV_MEASURE"] = "0"

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of concurrent processes wait for one another
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all workers, so that the compiled loops are built once."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="timm_contconv.")
        config.add_cleanup(folder.cleanup)
        os.environ["TIMM_CONTCONV_CACHE"] = folder.name


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
