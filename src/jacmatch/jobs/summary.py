"""The rows of a comparison: one for each method, mean and standard deviation over seeds."""

from collections.abc import Iterable, Sequence
from typing import Any

from jacmatch.runs import Run, spread

METHODS = {
    "labels": "labels only",
    "outputs": "labels + outputs",
    "jacobians": "labels + outputs + Jacobians",
}
"""What each method of a comparison is called in tables."""


def summarized(run: Run, methods: Sequence[str], trained: Iterable[tuple[int, str]], measure: str) -> dict[str, Any]:
    """The part of the result that its students decide; the last method stands for the run.

    Args:
        run: The run whose children are the students.
        methods: The methods, in the order of the rows.
        trained: Seed and method of each student.
        measure: `accuracy` or `rmse`.
    """
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed, method in trained:
        child = run.child(f"seed{seed}/{method}", identity(run, seed, method))
        results[method].append(child.result)
    rows = [_row(method, results[method], measure) for method in methods]
    main, last = results[methods[-1]], rows[-1]
    return {
        "teacher": main[0]["teacher"],
        "student": {**main[0]["student"], measure: last[measure]["mean"]},
        "agreement": {key: last["agreement"].get(key, {"mean": None})["mean"] for key in main[0]["agreement"]},
        "samples_per_second": sum(result["samples_per_second"] for result in main) / len(main),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in main),
        "rows": rows,
    }


def identity(run: Run, seed: int, method: str) -> dict[str, Any]:
    """The settings of one student of the run."""
    return {**run.settings, "seed": seed, "method": method}


def _row(method: str, results: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    return {
        "method": method,
        "label": METHODS[method],
        "seeds": len(results),
        "steps": results[0]["steps"],
        measure: spread([result["student"][measure] for result in results]),
        "agreement": {
            key: spread([result["agreement"][key] for result in results])
            for key, value in results[0]["agreement"].items()
            if value is not None
        },
        "seconds": spread([result["seconds"] for result in results]),
    }
