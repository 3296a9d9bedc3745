"""The engine's tests measure nothing, unless they ask for it, and leave the user's cache alone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from timm_contconv import ops


@pytest.fixture(scope="session")
def _compiled_loops() -> list[Path]:
    """The compiled library, in the cache of all tests."""
    with ops.algorithm("direct"):
        ops.conv(torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3), None, (1, 1), (0, 0), 2)
    return list(Path(os.environ["TIMM_CONTCONV_CACHE"]).glob("*.so"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _compiled_loops: list[Path]) -> Iterator[Path]:
    """A cache folder that holds nothing but the compiled library."""
    for library in _compiled_loops:
        shutil.copy2(library, tmp_path)
    monkeypatch.setenv("TIMM_CONTCONV_CACHE", str(tmp_path))
    with ops.measuring(False):
        yield tmp_path
