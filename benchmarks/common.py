"""What the scripts share: arguments, the machine, timing in turns, recorded results.

Timing in turns survives a machine that does other work: contenders run one after another in each round, so that
whatever else happens meets them alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import timm_contconv as tcc
from timm_contconv.cli.digits import Digits, load_digits

__all__ = [
    "IMAGES",
    "RESULTS",
    "against",
    "arguments",
    "few_digits",
    "in_turns",
    "infer",
    "machine",
    "machine_file",
    "medians",
    "multiply_adds",
    "new_parser",
    "ratio",
    "read_results",
    "require",
    "summary",
    "training_step",
    "write_block",
    "write_results",
]

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


# ---- arguments and results


def new_parser(description: str | None, results: str | None = None, threads: int = 1) -> argparse.ArgumentParser:
    """A parser with --threads and, for a script that records results, --output.

    Args:
        description: the script's docstring.
        results: the default of --output, a file in benchmarks/results; of timings, a `machine_file`.
        threads: the default of --threads. Small models run best on one: more would wait for one another.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads, help="of PyTorch")
    if results is not None:
        parser.add_argument("--output", type=Path, default=RESULTS / results)
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of this run. Sets PyTorch's threads and its random seed, 0."""
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    return parsed


def read_results(path: Path) -> dict[str, Any]:
    """What earlier runs recorded, or nothing."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def write_results(path: Path, record: Mapping[str, Any]) -> None:
    """Record results, and the machine that they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "machine": machine()}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures are of: processor, its vendor and vector instructions, threads, GPU, PyTorch's version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "vendor": fields.get("vendor_id", "unknown"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def machine_file(name: str) -> str:
    """A file of timings, in a folder with the processor's name and instructions: "amd-epyc-avx2/convnext.json"."""
    found = machine()
    folder = f"{found['processor']} {found['instructions']}".lower()
    return f"{re.sub(r'[^a-z0-9]+', '-', folder).strip('-')}/{name}"


def write_block(page: Path, start: str, lines: Sequence[str], end: str = "<!-- end -->") -> None:
    """Put lines of Markdown between the first `start` of a page and the next `end`.

    Raises:
        ValueError: the page lacks one of them; it stays as it is.
    """
    head, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page}: expected {start} and, below it, {end}; add both lines where the block belongs")
    page.write_text("\n".join((head + start, "", *lines, "", end)) + tail, encoding="utf-8")


@torch.no_grad()
def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Of a forward pass in eval mode, by PyTorch's counter; kernels are constructed before."""
    model.eval()(x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def summary(values: Sequence[float], decimals: int = 2) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def against(values: Sequence[float], plain: Sequence[float]) -> tuple[list[float], str]:
    """Differences from the plain network, paired by seed, and their mean ± standard deviation in words."""
    gains = [a - b for a, b in zip(values, plain, strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0
    return gains, f"against plain {statistics.mean(gains):+.2f} ± {spread:.2f} points"


def few_digits(count: int) -> Digits:
    """scikit-learn's digits, with the first `count` of the training images."""
    digits = load_digits()
    return dataclasses.replace(
        digits, train_images=digits.train_images[:count], train_labels=digits.train_labels[:count]
    )


def require(condition: bool, claim: str) -> None:
    """End the script with an error where its results do not show what they should.

    Raises:
        SystemExit: with the claim.
    """
    if not condition:
        raise SystemExit(f"not shown: {claim}")


# ---- timing


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    description: str = "measuring",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, in which every call runs once, in turns forwards and backwards.

    A round before these warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(rounds + 1), description=description, transient=True):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of slow / quick in the same round; at least two rounds."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slow, quick, strict=True)], n=4)
    return {"ratio": middle, "quartile_1": low, "quartile_3": high}


# ---- what is timed


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> None:
    """A forward pass in eval mode."""
    model.eval()
    model(images)


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """A call that does forward, backward, a step of AdamW and constraints, with random labels.

    Args:
        model: gives at least ten logits; it is put into training mode.
        images: what it takes.
    """
    labels = torch.randint(10, (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(tcc.param_groups(model.train(), lr=1e-5, weight_decay=0.05))

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tcc.constrain_(model)

    return step
