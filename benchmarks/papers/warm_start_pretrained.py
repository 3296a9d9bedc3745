"""What a patch leaves of a really pretrained network, EfficientNet-Lite0 with its ImageNet weights, on photographs.

    python -m benchmarks.papers.warm_start_pretrained [--crops N] [--size PIXELS] [--only RECIPE ...]

For each recipe: the time that a patch takes, the relative kernel errors, the part of the crops with the original's
top-1, the cosine of the logits, the Kullback-Leibler divergence. For DCLS also with 10 elements, as the paper's rule
gives for bilinear ones, before and after `tcc.refit_` with four crops of each of 15 photographs; crops of the others
are what is measured on. Writes benchmarks/results/warm_start_pretrained.json.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import timm_contconv as tcc
from benchmarks.common import arguments, new_parser, read_results, write_results
from timm_contconv.cli.lite0 import load_lite0, load_photographs

RECIPES: dict[str, dict[str, Any]] = {
    "dcls": {},
    "dcls_triangle": {},
    "dcls_gauss": {},
    "dcls, kernel_size=7": {"kernel_size": 7},
    "dcls_triangle, kernel_size=7": {"kernel_size": 7},
    "dcls_gauss, kernel_size=7": {"kernel_size": 7},
    "dcls, kernel_size=23": {"kernel_size": 23},
    "smp": {},
    "smp, points=filter": {"points": "filter"},
    "flex": {},
    "genv": {},
    "cc": {},
    "cc, kernel_size=7": {"kernel_size": 7},
}
REFITTED = ("dcls", "dcls_triangle", "dcls_gauss")
FOR_REFIT = 15  # photographs
FEW = 10  # elements


@torch.no_grad()
def outcome(model: nn.Module, original: nn.Module, images: Tensor) -> dict[str, float]:
    """Logits against the original's."""
    old, new = (torch.cat([net.eval()(part) for part in images.split(32)]) for net in (original, model))
    cosines = torch.cosine_similarity(old, new)
    divergence = nn.functional.kl_div(new.log_softmax(1), old.log_softmax(1), log_target=True, reduction="batchmean")
    return {
        "top1_kept": (old.argmax(1) == new.argmax(1)).double().mean().item(),
        "cosine_mean": cosines.mean().item(),
        "cosine_min": cosines.min().item(),
        "kl": divergence.item(),
    }


def patched(original: nn.Module, recipe: str, **settings: Any) -> tuple[nn.Module, dict[str, float]]:
    """A patched copy; seconds, kernel errors and parameters."""
    model = copy.deepcopy(original)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernel errors are in the table
        tcc.patch(model, recipe, progress=False, **settings)
    seconds = time.perf_counter() - start
    report = tcc.report(model)
    errors = [row.fit_error for row in report.rows if row.fit_error is not None]
    return model, {
        "seconds": seconds,
        "error_mean": statistics.mean(errors),
        "error_max": max(errors),
        "parameters": report.parameters_after / report.parameters_before - 1,
    }


def print_row(name: str, row: dict[str, float]) -> None:
    error = f"{row['error_mean']:.2g} / {row['error_max']:.2g}"
    cells = [name, f"{row['seconds']:.1f} s", f"{row['parameters']:+.1%}", error, f"{row['top1_kept']:.1%}"]
    cells += [f"{row['cosine_mean']:.4f} / {row['cosine_min']:.4f}", f"{row['kl']:.2g}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = new_parser(__doc__, "warm_start_pretrained.json", threads=2)
    parser.add_argument("--crops", type=int, default=2, help="of each photograph")
    parser.add_argument("--size", type=int, default=224, help="pixels of a crop")
    parser.add_argument("--only", nargs="*", default=[*RECIPES], choices=[*RECIPES])
    options = arguments(parser)
    original, everything = load_lite0(), load_photographs(options.crops, options.size).flatten(0, 1)
    for_refit = load_photographs(4, options.size, seed=1)[:FOR_REFIT].flatten(0, 1)
    unseen = load_photographs(4, options.size)[FOR_REFIT:].flatten(0, 1)
    results = read_results(options.output)
    results.pop("machine", None)
    print("| recipe | time | parameters | kernel error mean / max | top-1 kept | logit cosine mean / min | KL |")
    print("|---" * 7 + "|")
    for name in options.only:
        recipe = name.split(",")[0]
        model, row = patched(original, recipe, **RECIPES[name])
        results[name] = row | outcome(model, original, everything) | {"crops": len(everything), "size": options.size}
        print_row(name, results[name])
        if name not in REFITTED:
            continue
        few, row = patched(original, recipe, kernel_count=FEW)
        ruled = f"{name}, kernel_count={FEW}"
        results[ruled] = row | outcome(few, original, unseen)
        print_row(ruled, results[ruled])
        start = time.perf_counter()
        tcc.refit_(few, original, for_refit, progress=False)
        results[f"{ruled}, refitted"] = row | {"seconds": time.perf_counter() - start} | outcome(few, original, unseen)
        print_row(f"{ruled}, refitted", results[f"{ruled}, refitted"])
        write_results(options.output, results)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
