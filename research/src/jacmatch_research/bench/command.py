"""`jacmatch bench`: ratios of costs on this machine, compared with the claims of the documentation."""

import contextlib
import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from jacmatch.errors import InputError, unknown_name
from jacmatch.jobs.settings import claimed_folder
from jacmatch.jobs.study import Progress
from jacmatch.runs import environment
from jacmatch.runs.files import encoded, write_whole
from jacmatch.version import __version__
from jacmatch_research.bench import BENCHMARKS
from jacmatch_research.bench.claims import Benchmark, Conditions
from jacmatch_research.processes import one_thread

_NO_GPU = "no GPU available"


@dataclass(frozen=True)
class Bench:
    """Measure ratios of time and memory on this machine, and compare them with the claimed ones.

    The compared methods alternate in one process with one thread; memory is measured in new processes. Each finished
    benchmark writes OUT/NAME.json. For a row that cannot be measured, the reason is given.
    """

    main: ClassVar[str] = "out seed device smoke json"
    examples: ClassVar[tuple[str, ...]] = ("--smoke", "products --device cpu --out bench")
    keeps: ClassVar[tuple[str, ...]] = ("*.json",)
    """Files of an interrupted job for which its folder is not removed."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The benchmarks to run (see `jacmatch list`); by default all."""
    out: Path | None = None
    """Folder of the results. By default runs/bench-NUMBER with the next free number."""
    seed: int = 0
    """Random seed."""
    device: Literal["cpu", "cuda"] | None = None
    """Measure only the rows of this device. By default the rows of CPU and GPU; without a GPU, those of the GPU are
    empty."""
    smoke: bool = False
    """Run a few rounds on tiny networks in seconds, to test that it works. Its numbers mean nothing."""
    quick: bool = False
    """Deprecated name of --smoke."""

    def __post_init__(self) -> None:
        """Accept the former name of `smoke`."""
        if self.quick:
            warnings.warn("`--quick` of `bench` is now `--smoke`.", DeprecationWarning, stacklevel=2)
            object.__setattr__(self, "smoke", True)

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure, write and return the results."""
        for name in self.names:
            if name not in BENCHMARKS:
                raise unknown_name("A benchmark of `bench`", name, BENCHMARKS)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("`--device cuda` of `bench` needs a GPU.", do="Leave it out: its rows are then empty.")
        folder, done = self.folder("bench"), {}
        folder.mkdir(parents=True, exist_ok=True)
        with progress or Progress() as shown, one_thread():
            for name in dict.fromkeys(self.names or BENCHMARKS):
                count = len(self._plan(BENCHMARKS[name]))
                document = self._measure(name, folder, shown.training(f"bench {name}", count))
                write_whole(folder, f"{name}.json", encoded(document, name))
                done[name] = document
        return {"job": "bench", "benchmarks": done, "out": str(folder)}

    def folder(self, job: str) -> Path:
        """Return the folder of the results."""
        return self.out or claimed_folder(job)

    def _plan(self, benchmark: Benchmark) -> list[tuple[Any, str]]:
        kinds = ("cpu", "cuda") if self.device is None else (self.device,)
        return [(case, kind) for case in benchmark.cases for kind in kinds if kind in case.devices]

    def _measure(self, name: str, folder: Path, advance: Callable[[int, dict[str, float]], None]) -> dict[str, Any]:
        """The document of one benchmark."""
        benchmark, start, rows, load = BENCHMARKS[name], time.perf_counter(), [], [_load()]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and self.device != "cpu" else None
        for case, kind in self._plan(benchmark):
            torch.manual_seed(self.seed)
            missing = _NO_GPU if kind == "cuda" and gpu is None else ""
            rows.append(case.row(Conditions(kind, self.smoke, self.seed, missing, folder)))
            advance(len(rows), {})
        where, load = environment(gpu), [*load, _load()]
        return {
            "name": name,
            "about": benchmark.about,
            "rows": rows,
            "quick": self.smoke,
            "command": " ".join(["jacmatch bench", name, *self._flags()]),
            "seconds": round(time.perf_counter() - start, 1),
            "date": where["started"][:10],
            "commit": where["commit"],
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": 1, "gpu": gpu, "load": load},
            "versions": {
                "jacmatch": __version__,
                **{key: where[key] for key in ("python", "torch", "numpy")},
                **_peers(),
            },
        }

    def _flags(self) -> list[str]:
        flags = ["--smoke"] if self.smoke else []
        flags += [f"--seed {self.seed}"] if self.seed else []
        return flags + ([f"--device {self.device}"] if self.device else [])


def _peers() -> dict[str, str]:
    """Return the versions of the installed libraries for comparison."""
    results = {}
    for name in ("timm", "torchdistill", "torchjd", "smt", "jenn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            results[name] = importlib.metadata.version(name)
    return results


def _load() -> float | None:
    """The mean number of processes that ran or waited for a processor in the last minute, where the system counts."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    """The name of the processor, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
