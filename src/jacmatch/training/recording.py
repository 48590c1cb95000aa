"""What a training leaves behind while it goes on: rows of metrics, looks at the validation split, checkpoints."""

import math
import time

import torch

from jacmatch.datasets import Split
from jacmatch.runs import Run
from jacmatch.training.checkpoints import check_finite, keep
from jacmatch.training.evaluation import evaluate
from jacmatch.training.state import State


def known(state: State) -> dict[str, float]:
    """What of a row of metrics the host knows without asking the device."""
    shares = {f"share_{name}": float(share) for name, share in state.shares.items() if math.isfinite(share)}
    return shares | {"lr": state.optimizer.param_groups[0]["lr"], "seconds": state.elapsed()}


def log(state: State, run: Run | None, *, wait: bool) -> dict[str, float] | None:
    """Logs the rows that have arrived, and returns the last of them."""
    row = None
    for step, row in state.metrics.arrived(way_out(state), wait=wait):
        if run is not None and state.ranks.first:
            run.log({"step": step, **row})
    return row


def validation(state: State, split: Split) -> dict[str, float]:
    """Figures of the network that the run will end with (the average if one is kept), for the next row."""
    start = time.perf_counter()
    state.gather()
    student, ranks = state.student if state.average is None else state.average, state.ranks
    if ranks.size > 1 and len(split) >= ranks.size:  # each a part; means of unequal parts are weighted
        rows = torch.arange(ranks.rank, len(split), ranks.size)
        figures = evaluate(student, split.subset(rows), device=state.place)
        powers = {name: 2 if name == "rmse" else 1 for name in figures}
        sums = torch.tensor([figures[name] ** powers[name] * len(rows) for name in figures], dtype=torch.float64)
        means = (ranks.total(sums) / len(split)).tolist()
        figures = {name: mean ** (1 / powers[name]) for name, mean in zip(figures, means, strict=True)}
    else:
        figures = evaluate(student, split, device=state.place)
    state.aside += time.perf_counter() - start
    return {f"validation_{name}": value for name, value in figures.items()}


def save(state: State, run: Run) -> None:
    """Saves a checkpoint, unless the loss or a weight is no longer finite."""
    log(state, run, wait=True)
    state.metrics.send(state.step, {})  # steps since the last row: only to see whether they are finite
    state.metrics.arrived(way_out(state), wait=True)
    state.gather()
    check_finite(state.objective, way_out(state))
    keep(state, run)


def way_out(state: State) -> str:
    """What a user can do about a loss that is not finite."""
    kept = "There is no checkpoint." if state.kept is None else f"The checkpoint of step {state.kept} is kept."
    return f"Lower `lr`, set `clip`, or use precision='32'. {kept}"
