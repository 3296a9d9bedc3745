"""Run every arm and seed that is not recorded yet; one process per core, one thread each.

    python -m benchmarks.papers.proof.run [--arms TEXT] [--seeds 5] [--processes 2] [--data FOLDER]

An interrupted run is lost, recorded ones are kept: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import RESULTS, ROOT, machine

from .arms import ARMS, Arm, arms_of
from .data import FOLDER, Fashion, load_fashion
from .training import LEARNING_RATES, Schedule, train_arm

RECORDED = RESULTS / "proof.jsonl"
CHECKPOINTS = ROOT / "build" / "proof"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    seed: int
    schedule: Schedule

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arm, self.seed, *dataclasses.astuple(self.schedule)


def recorded(path: Path = RECORDED) -> list[dict[str, Any]]:
    """The recorded runs.

    Raises:
        ValueError: a line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: a damaged line ({error}); remove it, and the run will be repeated") from None


def wanted(arms: list[Arm], seeds: int, lr: float | None = None, **settings: int) -> Iterator[Run]:
    """All runs, seed by seed; plain networks ahead of the arms that start from them.

    Args:
        arms: what is trained.
        seeds: how many times.
        lr: the learning rate; None for that of the arm's family.
        settings: of the schedule.
    """
    for seed in range(seeds):
        for arm in sorted(arms, key=lambda arm: arm.after is not None):
            yield Run(arm.name, seed, Schedule(lr=LEARNING_RATES[arm.family] if lr is None else lr, **settings))


def _work(runs: Any, messages: Any, data: Path) -> None:
    torch.set_num_threads(1)
    fashion, parent = load_fashion(data), os.getppid()
    while (run := runs.get()) is not None:

        def advance(part: float, run: Run = run) -> None:
            if os.getppid() != parent:  # it was killed, and nobody would write the result
                raise SystemExit(1)
            messages.put(("step", run, part))

        messages.put(("start", run, 0.0))
        messages.put(("done", run, _record(run, fashion, advance)))


def _record(run: Run, fashion: Fashion, advance: Any) -> dict[str, Any]:
    result = train_arm(ARMS[run.arm], run.seed, fashion, run.schedule, CHECKPOINTS, advance)
    setting = {"arm": run.arm, "seed": run.seed, "schedule": dataclasses.asdict(run.schedule)}
    return {**setting, **result, "version": _version(), "machine": machine()}


def _version() -> str:
    """The commit; "-dirty" if files differ from it, beside results, to which runs add."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def execute(runs: list[Run], processes: int, data: Path, path: Path) -> None:
    """Train in several processes; append a line for each run that is done."""
    context = multiprocessing.get_context("spawn")
    queue, messages = context.Queue(), context.Queue()
    for run in [*runs, *[None] * processes]:
        queue.put(run)
    workers = [context.Process(target=_work, args=(queue, messages, data), daemon=True) for _ in range(processes)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        whole, tasks, left = progress.add_task("all runs", total=len(runs)), {}, len(runs)
        while left:
            try:
                kind, run, value = messages.get(timeout=5)
            except Empty:
                if failed := [worker for worker in workers if worker.exitcode not in (None, 0)]:
                    raise SystemExit(f"a process ended with exit status {failed[0].exitcode}; see above") from None
                continue
            if kind == "start":
                tasks[run] = progress.add_task(f"{run.arm}, seed {run.seed}", total=1)
            elif kind == "step":
                progress.advance(tasks[run], value)
                progress.advance(whole, value)
            else:
                progress.remove_task(tasks.pop(run))
                _append(path, value)
                left -= 1


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Schedule()
    parser.add_argument("--arms", default="", help="only the arm of this name, or those whose names contain it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--output", type=Path, default=RECORDED)
    parser.add_argument("--lr", type=float, help="another learning rate than the family's")
    parser.add_argument("--pictures", type=int, default=defaults.pictures)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--tuning-epochs", type=int, default=defaults.tuning_epochs)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("lr", "pictures", "epochs", "tuning_epochs")}
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes: expected 1 or more")
    try:
        load_fashion(options.data)  # an error now, and not in every process
        known = {(r["arm"], r["seed"], *r["schedule"].values()) for r in recorded(options.output)}
        runs = [run for run in wanted(arms_of(options.arms), options.seeds, **settings) if run.key not in known]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    print(f"{len(known)} runs are recorded, {len(runs)} to go", flush=True)
    try:
        execute(runs, options.processes, options.data, options.output)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; recorded runs are kept, the same command goes on with the others") from None


if __name__ == "__main__":
    main()
