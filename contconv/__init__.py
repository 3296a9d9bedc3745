"""The command line, `contconv`.

A package beside `timm_contconv`, because importing anything of that imports timm, which takes seconds. Here timm is
imported when a command needs it, so that --help, --version and completion answer at once.
"""

from .app import app, main

__all__ = ["app", "main"]
