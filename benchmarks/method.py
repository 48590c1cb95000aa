"""How a benchmark measures: contestants take turns in one process of one thread, and ratios are reported.

A ratio is taken in each round between two runs that stand side by side in time, so that what else the machine does
hits both. Reported are the median over the rounds and the quartiles.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import jacmatch

RESULTS = Path(__file__).parent / "results"


def ratio(contestant: Callable[[], object], baseline: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time of the contestant ÷ time of the baseline: median, quartiles and number of rounds, after a warm-up."""
    contestant(), baseline()
    ratios, seconds = [], []
    for number in range(rounds):
        first, second = (contestant, baseline) if number % 2 else (baseline, contestant)
        times = {}
        for run in (first, second):
            start = time.perf_counter()
            run()
            times[run] = time.perf_counter() - start
        ratios.append(times[contestant] / times[baseline])
        seconds.append(times[baseline])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio_median": round(median, 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
        "n": rounds,
        "baseline_seconds": round(statistics.median(seconds), 5),
    }


def peak_memory(script: str) -> int:
    """Largest resident memory in bytes of a fresh process that runs this Python text (Linux)."""
    text = f"import torch; torch.set_num_threads(1)\n{script}\n"
    # Not getrusage: its maximum is inherited from the process that started this one.
    text += "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, check=True)
    return int(printed.stdout.split()[-1]) * 1024


def main(name: str, claim: str, must: float | None, rows: Callable[[bool], list[dict[str, object]]]) -> None:
    """Runs a benchmark from its command line, prints the table, and writes benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = rows(given.quick)
    for row in measured:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    result = {
        "claim": claim,
        "must": must,
        "rows": measured,
        "quick": given.quick,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": 1},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jacmatch": jacmatch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/{name}.py" + (" --quick" if given.quick else ""),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    printed = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return printed.stdout.strip() or None
