"""How long it takes to start: the help of the command line, and importing this package compared with importing timm.

    python -m benchmarks.speed.startup [--rounds 10] [--output FILE]

Each is a process of its own; they take turns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import arguments, in_turns, machine_file, medians, new_parser, write_results

COMMANDS = {
    "contconv --help": [str(Path(sys.executable).with_name("contconv")), "--help"],
    "import timm": [sys.executable, "-c", "import timm"],
    "import timm_contconv": [sys.executable, "-c", "import timm_contconv"],
}


def process(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = new_parser(__doc__, machine_file("startup.json"))
    parser.add_argument("--rounds", type=int, default=10)
    args = arguments(parser)
    seconds = medians(in_turns({name: process(command) for name, command in COMMANDS.items()}, args.rounds))
    seconds["what importing timm_contconv adds to timm"] = seconds["import timm_contconv"] - seconds["import timm"]
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    write_results(args.output, {"seconds": seconds, "rounds": args.rounds})


if __name__ == "__main__":
    main()
