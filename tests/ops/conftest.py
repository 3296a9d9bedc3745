"""The engine's tests measure nothing, unless they ask for it, and leave the user's cache alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from timm_contconv import ops


@pytest.fixture(scope="session")
def _compiled_loops(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The compiled library, built once."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch, ops.algorithm("direct"):
        patch.setenv("TIMM_CONTCONV_CACHE", str(folder))
        ops.conv(torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3), None, (1, 1), (0, 0), 2)
    return list(folder.iterdir())


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _compiled_loops: list[Path]) -> Iterator[Path]:
    """A cache folder that holds nothing but the compiled library."""
    for library in _compiled_loops:
        shutil.copy2(library, tmp_path)
    monkeypatch.setenv("TIMM_CONTCONV_CACHE", str(tmp_path))
    with ops.measuring(False):
        yield tmp_path
