"""The files that a training writes while it runs: checkpoints, rows of metrics, and validation metrics.

A checkpoint is one file with everything that a run needs to continue exactly. It ends with the SHA-256 of its content,
because torch writes checksums but does not compare them when reading.
"""

import hashlib
import io
import math
import time
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError, converted_errors
from jacmatch.files import read
from jacmatch.objectives import Objective
from jacmatch.runs import CHECKPOINT, Run
from jacmatch.runs.files import write_whole
from jacmatch.runs.folder import warn_of_changes
from jacmatch.runs.identity import changed
from jacmatch.training.distributed import Shared, cut, scatter, whole
from jacmatch.training.evaluation import evaluate
from jacmatch.training.identity import as_before, host_state, set_host_state, student_identity
from jacmatch.training.state import State

_STATE = "_extra_state"  # extra state of an objective: it is on the CPU, and no weight
_ANEW = "Remove it to start again."
_OTHER = "Restore the original inputs, or give the run another folder."
_MARK = b"\njacmatch sha256 "
_END = len(_MARK) + 64  # characters of the digest
_PARTS = (
    *("run", "student", "step", "seconds", "aside"),
    *("objective", "average", "optimizer", "precision", "random", "random_cuda", "random_host"),
)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state to a file atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.write(_MARK + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_whole(path.parent, path.name, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read the state that `save` wrote, to the CPU. No code in the file is run."""
    rule = f"{path} must be a complete checkpoint of jacmatch."
    with converted_errors(rule, _ANEW):  # torch raises a different type for each way in which a file can be damaged
        content = memoryview(read(path.parent, path))
        body, end = content[:-_END], bytes(content[-_END:])
        if end != _MARK + hashlib.sha256(body).hexdigest().encode():
            raise InputError(rule, got="a file without the checksum that it was written with", do=_ANEW)
        with zipfile.ZipFile(io.BytesIO(body)) as parts:
            if sum(part.file_size for part in parts.infolist()) > len(body):
                raise InputError(rule, got="parts that are larger than the file", do=_ANEW)
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path} must be a checkpoint of jacmatch.", got=f"a {type(state).__name__}", do=_ANEW)
    return state


def check_same(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run with other settings."""
    if names := changed(saved, here):
        raise InputError(f"{path} must be a checkpoint of this run.", got=f"one that differs in {names}", do=_OTHER)


def load_weights(module: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Copy weights into the module: all of them, or none if they do not fit.

    Example:
        >>> load_weights(nn.Linear(2, 1), nn.Linear(3, 1).state_dict(), Path("checkpoint.pt"))
        Traceback (most recent call last):
        jacmatch.errors.InputError: checkpoint.pt must contain weights of this model. Got 'weight' of shape (1, 3), ...
    """
    own = module.state_dict()
    for name in dict.fromkeys((*own, *weights)):
        if name.endswith(_STATE):  # other versions may store it differently: the module itself reads it
            continue
        there, here = _described(weights, name), _described(own, name)
        if there != here:
            rule = f"{path} must contain weights of this model."
            got = f"{name!r} of {there}, not of {here}"
            raise InputError(rule, got=got, do="Build the same network, or choose the right file.")
    module.load_state_dict(dict(weights))


def _described(weights: Mapping[str, Any], name: str) -> str:
    if name not in weights:
        return "nothing"
    value = weights[name]
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def keep(state: State, run: Run) -> None:
    """Save the state as the run's checkpoint."""
    start = time.perf_counter()
    cuda = state.device.type == "cuda"
    random = state.ranks.all_gather(torch.get_rng_state())
    random_cuda = state.ranks.all_gather(torch.cuda.get_rng_state(state.device)) if cuda else None
    names, table = state.metrics.table()
    parts = {
        "run": state.described(),
        "student": _student(state),
        "environment": _environment(),
        "step": state.step,
        "seconds": state.elapsed(),
        "aside": state.aside,
        "skipped": state.skipped + len(state.metrics.skipped),
        "since_row": (names, table.cpu()),
        "objective": state.objective.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "optimizer": whole(state.optimizer.state_dict()) if state.settings.shard else state.optimizer.state_dict(),
        "precision": state.precision.state_dict(),
        "random": random,
        "random_cuda": random_cuda,
        "random_host": state.ranks.all_gather(host_state()),
    }
    if state.ranks.first:
        save(run.path / CHECKPOINT, parts)
    state.saved_step = state.step
    state.aside += time.perf_counter() - start


def resume(state: State, run: Run) -> None:
    """Restore the state from the run's checkpoint, if there is one, and drop the rows logged after it."""
    path = run.path / CHECKPOINT
    if path.is_file():
        saved = load(path)
        missing = [part for part in _PARTS if part not in saved]
        if missing:
            raise InputError(f"{path} must be a checkpoint of a training run.", got=f"one without {missing}", do=_ANEW)
        with converted_errors(f"{path} must be a checkpoint of this run.", _ANEW):  # right checksum, wrong contents
            _restore(state, saved, path)
    state.ranks.same("checkpoint", state.step)
    if state.ranks.first and run.metrics():
        run.rewind(state.step)


def _restore(state: State, saved: Mapping[str, Any], path: Path) -> None:
    here = state.described()
    if "objective.balance" in saved["run"] and "objective.loss_weights" in here:
        here = as_before(here, saved["run"])
    check_same(path, saved["run"], here)
    warn_of_changes(saved.get("environment", {}), _environment())
    load_weights(state.objective, saved["objective"], path)
    if state.average is not None:
        load_weights(state.average, saved["average"], path)
    memory = saved["optimizer"]
    if state.settings.shard and isinstance(state.shared, Shared):
        scatter(state.shared, state.objective)
        memory = cut(memory, state.optimizer)
    if not state.settings.shard:
        check_same(path, saved["student"], _student(state))
    known = [set(group) for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(memory)
    _check_memory(state, known)
    state.precision.load_state_dict(saved["precision"])
    own = state.ranks.rank if state.ranks.size > 1 else ...
    torch.set_rng_state(saved["random"][own].clone())  # cloned: torch ignores the storage offset of a row
    if state.device.type == "cuda" and saved["random_cuda"] is not None:
        torch.cuda.set_rng_state(saved["random_cuda"][own].clone(), state.device)
    set_host_state(saved["random_host"][own].clone())
    state.step = state.saved_step = int(saved["step"])
    state.seconds, state.aside = float(saved["seconds"]), float(saved["aside"])
    state.skipped = int(saved.get("skipped", 0))
    names, table = saved.get("since_row", ((), torch.empty(0, 0)))
    state.metrics.steps = [dict(zip(names, row, strict=True)) for row in table.to(state.device)]


def _environment() -> dict[str, Any]:
    """The environment of a checkpoint, on which the rounding of the next step depends."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}


def _student(state: State) -> dict[str, Any]:
    """Return fingerprints of the student with its weights, if the whole student is in this process."""
    return student_identity(state.student, state.shown, probed=not state.settings.shard)


def _check_memory(state: State, known: list[set[str]]) -> None:
    """Refuse optimizer settings, other than the `known` ones, and averages that this optimizer does not have."""
    if [set(group) for group in state.optimizer.param_groups] != known:
        raise ValueError("settings of another optimizer")
    names = {"momentum_buffer"} if state.settings.optimizer == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    for parameter, entry in state.optimizer.state.items():
        tensors = {name: value for name, value in entry.items() if value is not None}
        if set(tensors) - names or (tensors and set(tensors) != names):
            raise ValueError(f"{sorted(tensors)} of a parameter, not {sorted(names)}")
        shapes = {tuple(value.shape) for name, value in tensors.items() if name != "step"}
        if not state.settings.shard and shapes - {tuple(parameter.shape)}:
            raise ValueError("averages whose shape differs from the parameter's")


def check_finite(module: nn.Module, do: str) -> None:
    """Refuse a module with a parameter or buffer that is not finite."""
    state = {name: value for name, value in module.state_dict().items() if not name.endswith(_STATE)}
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()  # one wait for all of them
    for name, good in zip(weights, finite, strict=True):
        if not good:
            rule = "Weights and buffers must stay finite in training."
            raise InputError(rule, got=f"NaN or infinity in {name!r}", do=do)


def host_figures(state: State) -> dict[str, float]:
    """Return the entries of a row of metrics that are known on the host without synchronization."""
    shares = {f"share_{name}": float(share) for name, share in state.shares.items() if math.isfinite(share)}
    return shares | {"lr": state.optimizer.param_groups[0]["lr"], "seconds": state.elapsed()}


def log_rows(state: State, run: Run | None, *, wait: bool) -> dict[str, float] | None:
    """Log the rows that have arrived on the host, and return the last of them."""
    row = None
    for step, row in state.metrics.arrived(remedy(state), wait=wait):
        if run is not None and state.ranks.first:
            run.log({"step": step, **row})
    return row


def validate(state: State, split: Split) -> dict[str, float]:
    """Evaluate the network that the run will end with (the running average if there is one), for the next row."""
    start = time.perf_counter()
    state.gather()
    student, ranks = state.student if state.average is None else state.average, state.ranks
    known = state.objective if isinstance(state.objective, Objective) else None
    selected = nullcontext() if known is None else known.selected_outputs(student)
    together = split.y.dim() > 1 and not split.y.is_floating_point()  # mIoU is not a mean over samples
    if ranks.size > 1 and len(split) >= ranks.size and not together:  # each a part; means of unequal parts are weighted
        rows = torch.arange(ranks.rank, len(split), ranks.size)
        with selected:
            figures = evaluate(student, split.subset(rows), device=state.device)
        powers = {name: 2 if name == "rmse" else 1 for name in figures}
        sums = torch.tensor([figures[name] ** powers[name] * len(rows) for name in figures], dtype=torch.float64)
        means = (ranks.all_reduce(sums) / len(split)).tolist()
        figures = {name: mean ** (1 / powers[name]) for name, mean in zip(figures, means, strict=True)}
    else:
        with selected:
            figures = evaluate(student, split, device=state.device)
    state.aside += time.perf_counter() - start
    return {f"validation_{name}": value for name, value in figures.items()}


def save_checked(state: State, run: Run) -> None:
    """Save a checkpoint, unless the loss or a weight is not finite."""
    log_rows(state, run, wait=True)
    state.metrics.check(state.step, remedy(state))
    state.gather()
    check_finite(state.objective, remedy(state))
    if not (run.settings.get("smoke") and state.step == state.settings.steps):  # restarting is faster
        keep(state, run)


def remedy(state: State) -> str:
    """The remedy for a loss that is not finite."""
    step = state.saved_step
    checkpoint = "There is no checkpoint." if step is None else f"The checkpoint of step {step} is kept."
    return f"Lower `lr`, set `clip`, or use precision='32'. {checkpoint}"
