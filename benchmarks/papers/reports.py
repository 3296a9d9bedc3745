"""Reports of the papers' models with tcc.inspect: how long they take, how large they are.

    python -m benchmarks.papers.reports [NAME ...] [--folder reports] [--threads 2]

"by_hand" is a convnext_atto patched with dcls_gauss, its positions moved by 0.7 pixels (standard deviation). Weights
are random. The times are recorded in benchmarks/results/reports.json, the reports are written to the folder.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import timm
import torch
from torch import nn

import timm_contconv as tcc
from benchmarks.common import arguments, new_parser, read_results, write_results

BY_HAND = "by_hand"
NAMES = ("convnext_tiny_dcls_gauss", "smpconv_tiny", "flexnet7", "resnet50_genv", "resnet18_cc", BY_HAND)
SHIFT = 0.7


def create(name: str) -> tuple[nn.Module, nn.Module | None]:
    """A model, and the model that it started from if that is known."""
    torch.manual_seed(0)
    if name != BY_HAND:
        return timm.create_model(name), None
    model = timm.create_model("convnext_atto")
    start = copy.deepcopy(model)
    tcc.patch(model, "dcls_gauss")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("position"):
                value.add_(torch.randn_like(value), alpha=SHIFT)
    return model, start


def main() -> None:
    parser = new_parser(__doc__, results="reports.json", threads=2)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--folder", type=Path, default=Path("reports"))
    options = arguments(parser)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = read_results(options.output)
    for name in options.names:
        model, before = create(name)
        start = time.perf_counter()
        path = tcc.inspect(model, start=before).save(options.folder / f"{name}.html")
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
        record[name] = {"seconds": round(seconds, 1), "megabytes": round(size, 2)}
        print(f"{name:26s} {seconds:5.1f} s  {size:4.2f} MB", flush=True)
    write_results(options.output, record)


if __name__ == "__main__":
    main()
