"""Recorded runs, chosen and paired: the same seed of an arm and of the network that it is compared with."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from .arms import ARMS, PLAIN

__all__ = ["FEWEST", "Difference", "Group", "groups", "metric", "paired", "reference"]

CONFIDENCE = 0.95
#: with fewer pairs, Student's interval says next to nothing
FEWEST = 3

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        mean: of arm - reference.
        half: of the 95 % interval's width (Student's t); infinite for one pair.
        pairs: number of seeds.
    """

    mean: float
    half: float
    pairs: int

    @property
    def is_seen(self) -> bool:
        """Whether there are at least three pairs and the interval leaves out zero."""
        return self.pairs >= FEWEST and abs(self.mean) > self.half


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have; None if there is none."""
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not differences:
        return None
    count = len(differences)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(differences) if count > 1 else math.inf
    return Difference(statistics.mean(differences), float(half), count)


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one schedule.

    Attributes:
        pictures, epochs: of that schedule.
        arms: by arm, in the order of `ARMS`, then by seed; only runs with the learning rate that the family's plain
            network has in most of its runs.
    """

    pictures: int
    epochs: int
    arms: Mapping[str, Mapping[int, Record]]

    def values(self, arm: str, value: Callable[[Record], float]) -> dict[int, float]:
        """A value of every run of an arm, by seed; of an arm without runs, nothing."""
        return {seed: value(record) for seed, record in self.arms.get(arm, {}).items()}

    def accuracies(self, arm: str) -> list[float]:
        """Test accuracies of an arm after its last epoch, in percent, one per seed."""
        return list(self.values(arm, metric("accuracy")).values())

    def difference(self, arm: str, other: str, value: Callable[[Record], float]) -> Difference | None:
        """An arm against another, paired by seed."""
        return paired(self.values(arm, value), self.values(other, value))


def groups(records: Sequence[Record]) -> list[Group]:
    """Runs by schedule; first the one with the most runs, then by pictures. Arms that no longer exist are left out."""
    known = [record for record in records if record["arm"] in ARMS]
    counts = Counter(_schedule(record) for record in known)
    schedules = sorted(counts, key=lambda schedule: (counts[schedule] == max(counts.values()), schedule), reverse=True)
    return [_group(*schedule, [r for r in known if _schedule(r) == schedule]) for schedule in schedules]


def _schedule(record: Record) -> tuple[int, int]:
    return record["schedule"]["pictures"], record["schedule"]["epochs"]


def _group(pictures: int, epochs: int, records: Sequence[Record]) -> Group:
    rates = {family: _usual_rate(records, plain) for family, plain in PLAIN.items()}
    arms: dict[str, dict[int, Record]] = {}
    for name, arm in ARMS.items():
        mine = [r for r in records if r["arm"] == name and r["schedule"]["lr"] == rates[arm.family]]
        if mine:
            arms[name] = {record["seed"]: record for record in mine}
    return Group(pictures, epochs, arms)


def _usual_rate(records: Sequence[Record], plain: str) -> float | None:
    rates = Counter(record["schedule"]["lr"] for record in records if record["arm"] == plain)
    return rates.most_common(1)[0][0] if rates else None


def reference(name: str) -> str | None:
    """The arm that another is compared with: its family's plain network, fine-tuned as long if it is fine-tuned.

    None for these themselves.
    """
    arm = ARMS[name]
    plain = f"{arm.family}, then plain" if arm.after else PLAIN[arm.family]
    return None if name == plain else plain


def metric(path: str) -> Callable[[Record], float]:
    """A reader of one value of a record: "accuracy" in percent, "robustness/shift 1" in percent, or a path as it is."""

    def read(record: Record) -> float:
        if path == "accuracy":
            return 100 * float(record["test"][-1])
        value: Any = record
        for part in path.split("/"):
            value = value[part]
        return float(value) * (100 if path.startswith("robustness/") else 1)

    return read
