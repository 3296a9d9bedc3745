"""`contconv export`: write a model to a file for deployment, and say what was checked and how fast it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contconv.output import Output

from ..export import SUFFIX, Format, export
from ..patching.record import get_record
from ..patching.restore import original_architecture

__all__ = ["run"]


def run(console: Output, model: nn.Module, path: Path, format: Format, merge: bool, **sizes: Any) -> None:
    """As `tcc.export`, which takes `sizes` too; and once more for the model before its patch, to compare with."""
    console.print(str(export(model, path, format, merge=merge, **sizes)), soft_wrap=True)
    if get_record(model) is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / f"plain{SUFFIX[format]}"
        before = export(_before_patch(model), plain, format, **sizes)
    console.print(
        f"the model before its patch, with random weights, in the same runtime: {1e3 * before.seconds:.1f} ms an image,"
        f" {before.bytes / 1e6:.1f} MB",
        soft_wrap=True,
    )


@torch.no_grad()
def _before_patch(model: nn.Module) -> nn.Module:
    """The architecture before the patch, with small random weights."""
    plain = original_architecture(model).to_empty(device="cpu")
    for buffer in plain.buffers():
        buffer.zero_()
    for parameter in plain.parameters():
        parameter.normal_(0, 0.02)
    return plain
