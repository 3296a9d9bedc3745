"""`python -m tests.attacks`: many of each attack; the counts go into docs/security.md.

Options: --walks N, --steps N, --folders N, --kills N.
"""

from __future__ import annotations

import argparse
import platform
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import timm_contconv as tcc

from ..hub.helpers import small
from . import kills, mutations, walk

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"walks": 150, "steps": 25, "folders": 1200, "kills": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    killed = kills.attack(arguments.kills)
    print(killed, flush=True)
    damage(arguments.folders)
    print(mutations.COUNTS, flush=True)
    wander(arguments.walks, arguments.steps)
    print(walk.COUNTS, flush=True)
    minutes = (time.monotonic() - start) / 60
    parts = [
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one core,"
        f" {minutes:.0f} minutes. Nothing was lost, half changed or let in: any such case ends the run.",
        table("kill -9 while a model is saved over another: what stood afterwards", killed),
        table("damaged folders, half of them loaded by `from_pretrained` and half by timm", mutations.COUNTS),
        table(f"steps of {arguments.walks} random walks", walk.COUNTS),
    ]
    text = PAGE.read_text(encoding="utf-8")
    counts = "<!-- counts -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- counts -->.*<!-- end -->", lambda _: counts, text, flags=re.DOTALL), encoding="utf-8")


def damage(count: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        saved = tcc.save_pretrained(small(), Path(root) / "model")
        (scratch := Path(root) / "scratch").mkdir()
        for seed in range(count):
            mutations.attack(saved, scratch, seed)


def wander(count: int, steps: int) -> None:
    run_state_machine_as_test(
        walk.ModelWalk,
        settings=settings(
            max_examples=count, stateful_step_count=steps, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,), print_blob=True,
        ),
    )  # fmt: skip


def table(title: str, counts: Counter[str]) -> str:
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in sorted(counts.items()))
    return f"| {title} | times |\n|---|---|\n{rows}\n| all | {sum(counts.values()):,} |"


if __name__ == "__main__":
    main()
