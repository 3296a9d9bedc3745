"""The recorded cost rules: seconds per unit of work, as benchmarks/depthwise_fit.py and dense_fit.py measured them."""

import json
from collections.abc import Callable
from pathlib import Path

__all__ = ["predict"]

# Read at import: torch.compile traces the choice of an algorithm, and can't read files.
_ROWS: dict[str, dict[str, list[float]]] = {
    key: row
    for name in ("costs.json", "dense_costs.json")
    for key, row in json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))["seconds"].items()
}


def predict(key: str, features: Callable[[str], tuple[float, ...]]) -> dict[str, float]:
    """Seconds that each algorithm is expected to take, on the machine that its file names.

    Args:
        key: the kind of work: device, dimensions, dtype, layout and pass.
        features: from an algorithm's name to its amounts of work.

    Returns:
        Seconds by algorithm; empty where nothing was measured.
    """
    return {
        name: sum(c * f for c, f in zip(row, features(name), strict=True)) for name, row in _ROWS.get(key, {}).items()
    }
