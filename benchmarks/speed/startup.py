"""How long it takes to start: the help of the command line, importing timm, and importing this package after timm.

    python -m benchmarks.speed.startup [--rounds 10] [--output FILE]

Each is a process of its own; they take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import arguments, in_turns, machine_file, new_parser, write_results

#: an installed package has its bytecode
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
HELP = [str(Path(sys.executable).with_name("contconv")), "--help"]
#: prints the seconds of both
IMPORTS = """
import time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_contconv
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    parser = new_parser(__doc__, machine_file("startup.json"))
    parser.add_argument("--rounds", type=int, default=10)
    args = arguments(parser)
    imports: list[list[float]] = []

    def run_imports() -> None:
        run = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, env=ENVIRONMENT
        )
        imports.append([float(part) for part in run.stdout.split()])

    def show_help() -> None:
        subprocess.run(HELP, stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)

    times = in_turns({"contconv --help": show_help, "imports": run_imports}, args.rounds)
    timm, ours = (statistics.median(column) for column in zip(*imports[-args.rounds :], strict=True))
    help_ = statistics.median(times["contconv --help"])
    seconds = {"contconv --help": help_, "import timm": timm, "import timm_contconv after timm": ours}
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    write_results(args.output, {"seconds": seconds, "rounds": args.rounds})


if __name__ == "__main__":
    main()
