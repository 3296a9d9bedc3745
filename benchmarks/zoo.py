"""Patch a model of every family in timm with every method, and write what happened to docs/zoo.md.

    python -m benchmarks.zoo                          # all families: about half an hour on two cores
    python -m benchmarks.zoo --family convnext --family resnet

Of each family the smallest model that has such convolutions is taken, with random weights. A patch counts where the
output keeps its shape and is finite, a gradient reaches every new parameter, and `tcc.merge` gives the same output.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import timm_contconv as tcc
from timm_contconv.layers import ConvReplacement
from timm_contconv.patching.select import PRESETS

RECIPES = {
    "depthwise": ("dcls_gauss", "smp", "flex"),
    "strided": ("genv", "cc"),
}
RESULTS = Path(__file__).parent / "results" / "zoo.json"
PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
SIZES = (128, 224)  # pixels of an image, the first that the model takes, before its own size


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one model under one recipe.

    Attributes:
        family: timm's module.
        model: the architecture.
        recipe: the patch.
        replaced: number of convolutions.
        left_alone: selected convolutions that were not replaced, by reason.
        fit_error: median of the relative kernel errors of the warm start.
        merge_error: ||merged output - patched output|| / ||patched output||.
    """

    family: str
    model: str
    recipe: str
    replaced: int
    left_alone: dict[str, int]
    fit_error: float | None
    merge_error: float | None


def check(model: nn.Module, recipe: str, images: Tensor, family: str = "", name: str = "") -> Outcome:
    """Patch a model and verify what a patch promises.

    Args:
        model: any image model; it is changed.
        recipe: a recipe's name.
        images: (N, C, H, W).

    Raises:
        AssertionError: a promise is not kept.
    """
    wake(model)
    shape = output(model, images).shape
    try:
        tcc.patch(model, recipe, progress=False)
    except ValueError as error:
        if "can replace none" not in str(error):
            raise
        reasons = Counter(line.split(": ", 1)[1] for line in str(error).splitlines()[1:])
        return Outcome(family, name, recipe, 0, dict(reasons), None, None)
    model.train()
    out = output(model, images)
    assert out.shape == shape, f"output {tuple(out.shape)}, before {tuple(shape)}"
    assert out.isfinite().all(), "output is not finite"
    out.float().square().mean().backward()
    for name_, parameter, pixels in new_parameters(model):
        assert parameter.grad is not None, f"no gradient reaches {name_}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name_} is not finite"
        # a continuous kernel of one pixel is read at distance 0 alone, where its net's slope does not matter
        assert parameter.grad.any() or pixels == 1, f"the gradient of {name_} is 0"
    model.eval()
    with torch.no_grad():
        expected = output(model, images)
        merged = output(tcc.merge(model), images)
    error = (torch.linalg.vector_norm(merged - expected) / torch.linalg.vector_norm(expected)).item()
    assert error < 1e-4, f"merged output differs by {error:.1e}"
    report = tcc.report(model, input_size=images.shape[1:])
    fits = [row.fit_error for row in report.rows if row.fit_error is not None]
    left = dict(Counter(report.left_alone.values()))
    return Outcome(family, name, recipe, len(fits), left, statistics.median(fits), error)


def wake(model: nn.Module) -> None:
    """Move parameters that start at 0 and keep gradients from what is before them (scales of residual paths)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def output(model: nn.Module, images: Tensor) -> Tensor:
    """The tensor that a model returns: the last feature map of a feature extractor, the first field of another."""
    out = model(images)
    while not isinstance(out, Tensor):
        if isinstance(out, list):
            out = out[-1]
        else:
            out = out[0] if isinstance(out, tuple) else next(v for v in out.values() if v is not None)
    return out


def new_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    """Parameters of the layers that a patch put in, shared ones too, and the pixels of the layer's kernel."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, ConvReplacement):
            own = [(f"{name}.{key}", parameter) for key, parameter in layer.named_parameters()]
            shared = [(f"{name}.geometry.{key}", parameter) for key, parameter in layer.geometry.items()]
            pixels = math.prod(layer.kernel_size)
            found += [(key, parameter, pixels) for key, parameter in (*own, *shared) if parameter.requires_grad]
    return found


def families() -> list[str]:
    """Modules of timm itself that register architectures."""
    return [family for family in timm.list_modules() if importlib.util.find_spec(f"timm.models.{family}") is not None]


def smallest(family: str, rule: Callable[[_ConvNd], bool]) -> str | None:
    """The model of a family with the fewest parameters among those that have such a convolution."""
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        if any(isinstance(module, _ConvNd) and rule(module) for module in model.modules()):
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def sample(model: nn.Module, name: str) -> Tensor:
    """Two images, small where the architecture takes any size."""
    config = model.pretrained_cfg
    channels, *size = config["input_size"]
    small = [] if config.get("fixed_input_size") else [[min(pixels, s) for s in size] for pixels in SIZES]
    candidates = [*small, size]
    generator = torch.Generator().manual_seed(0)
    for height, width in candidates:
        images = torch.randn(2, channels, height, width, generator=generator)
        try:
            with torch.no_grad():
                output(model.eval(), images)
        except (AssertionError, RuntimeError):
            if [height, width] == candidates[-1]:
                raise
        else:
            return images
    raise AssertionError(name)


def visit(family: str) -> list[Outcome]:
    """Every recipe on the models of a family that it applies to."""
    outcomes = []
    for preset, recipes in RECIPES.items():
        name = smallest(family, PRESETS[preset])
        if name is None:
            continue
        for recipe in recipes:
            torch.manual_seed(0)
            model = timm.create_model(name)
            outcomes.append(check(model, recipe, sample(model, name), family, name))
    return outcomes


def page(outcomes: Sequence[Outcome], without: Sequence[str], version: str) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Every family of timm",
        "",
        f"`make zoo` (`python -m benchmarks.zoo`) patched, with timm {version}, the smallest model of each family that"
        " has such convolutions, with random weights. For each it checked: the same output shape, finite outputs, a"
        " gradient at every new parameter, the same output after `tcc.merge` (to 1e-4). A cell says how many"
        " convolutions were replaced and, in brackets, the median relative error of the warm start's kernels.",
        "",
    ]
    for preset, recipes in RECIPES.items():
        rows: dict[tuple[str, str], dict[str, Outcome]] = {}
        for outcome in outcomes:
            if outcome.recipe in recipes:
                rows.setdefault((outcome.family, outcome.model), {})[outcome.recipe] = outcome
        lines += [f"## {preset.capitalize()} convolutions: {len(rows)} families", ""]
        lines += [f"| family | model | {' | '.join(recipes)} | left alone |", "|---" * (len(recipes) + 3) + "|"]
        for (family, model), by_recipe in rows.items():
            cells = [_cell(by_recipe[recipe]) for recipe in recipes]
            left = Counter({reason: n for o in by_recipe.values() for reason, n in o.left_alone.items()})
            reasons = "; ".join(f"{n}: {reason}" for reason, n in left.items())
            lines.append(f"| {family} | {model} | {' | '.join(cells)} | {reasons} |")
        lines.append("")
    return "\n".join([*lines, f"Families without either: {', '.join(without)}.", ""])


def _cell(outcome: Outcome) -> str:
    return f"{outcome.replaced} ({outcome.fit_error:.0e})" if outcome.fit_error is not None else "0"


def read_results() -> dict[str, list[Outcome]]:
    """What earlier runs found, by family."""
    if not RESULTS.is_file():
        return {}
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {family: [Outcome(**outcome) for outcome in outcomes] for family, outcomes in recorded.items()}


def write_results(results: dict[str, list[Outcome]]) -> None:
    """Record what was found, and write the page."""
    ordered = {family: results[family] for family in sorted(results)}
    plain = {family: [dataclasses.asdict(outcome) for outcome in found] for family, found in ordered.items()}
    RESULTS.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    outcomes = [outcome for found in ordered.values() for outcome in found]
    without = [family for family, found in ordered.items() if not found]
    PAGE.write_text(page(outcomes, without, timm.__version__), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only these; the others' results stay")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="timm")
    failed = []
    for family in track(arguments.family or families(), description="families"):
        try:
            found = visit(family)
        except Exception as error:  # one family's failure is a line of the outcome, not the end of the run
            failed.append(f"{family}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        print(*found, sep="\n", flush=True)
        write_results(read_results() | {family: found})  # read anew: several processes may share the families
    print(f"{len(failed)} failures")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
