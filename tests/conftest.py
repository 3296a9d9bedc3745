"""What all tests share."""

import gc
import os
import tempfile
from collections.abc import Iterator

import pytest

# Read when the package is imported: only tests of the engine measure, and none touches the user's cache.
os.environ["TIMM_CONTCONV_MEASURE"] = "0"

gc.set_threshold(10_000, 20, 50)  # a collection looks at half a million objects of PyTorch's and timm's

# The process that only hands tests out to others starts sooner without torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # threads of concurrent processes wait for one another


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all workers, so that the compiled loops are built once."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="timm_contconv.")
        config.add_cleanup(folder.cleanup)
        os.environ["TIMM_CONTCONV_CACHE"] = folder.name


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of small operations, where threads mostly wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
