"""The command line, `contconv`."""

from .app import app

__all__ = ["app"]
