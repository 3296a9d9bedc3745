"""The engine's tests measure nothing, unless they ask for it, and leave the user's cache alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from timm_contconv import ops


@pytest.fixture(autouse=True)
def _prior_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TIMM_CONTCONV_CACHE", str(tmp_path))
    with ops.measuring(False):
        yield
