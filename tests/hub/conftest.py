"""What the tests of saving, publishing and pulling share."""

import pytest
import torch

from .server import running_hub, use_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between retries take no time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)
