"""How long it takes until tutelage is there: its import and its command line, beside torch's import alone.

    python benchmarks/start_up.py

Each line is run in a process of its own, all in turn; what counts is the median of the differences to torch's import of
the same round. `import tutelage` imports nothing until something of it is used, so the line with what a training uses
stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tutelage.deploy.report import environment
from tutelage.files import replacing

TORCH = "import torch"
LINES = {
    TORCH: ["-c", TORCH],
    "import torch, tutelage": ["-c", "import torch, tutelage"],
    "import torch; from tutelage import distill, KD, FitNets, CRD, Training": [
        "-c",
        "import torch; from tutelage import distill, KD, FitNets, CRD, Training",
    ],
    "import torch; from tutelage import *": ["-c", "import torch; from tutelage import *"],
    "tutelage --version": ["-m", "tutelage", "--version"],
    "tutelage --help": ["-m", "tutelage", "--help"],
    "tutelage methods": ["-m", "tutelage", "methods"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/start_up.json")
    given = parser.parse_args()
    for arguments in LINES.values():  # compiles what has to be compiled
        seconds(arguments)
    rounds = [{line: seconds(arguments) for line, arguments in LINES.items()} for _ in range(given.rounds)]
    rows = [
        {
            "line": line,
            "seconds": round(statistics.median(r[line] for r in rounds), 3),
            "beyond_torch": round(statistics.median(r[line] - r[TORCH] for r in rounds), 3),
        }
        for line in LINES
    ]
    for row in rows:
        print(row)
    content = {"rounds": given.rounds, "environment": environment(), "rows": rows}
    with replacing(given.out) as beside:
        Path(beside).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
