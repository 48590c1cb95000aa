"""The only training loop of the library: batches, optimizer steps, metrics and checkpoints.

Read `_loop` first, then `_train_step`. Only validation, checkpoints and the loss scaling of fp16 (which decides on the
host whether to skip a step) wait for the GPU: metrics are logged when they arrive.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.objectives import CompiledSteps, Objective
from jacmatch.runs import Run
from jacmatch.training import checkpoints, checks
from jacmatch.training.checkpoints import check_finite, resume
from jacmatch.training.configuration import Training, ema_decay, factor
from jacmatch.training.data import Batches, resident
from jacmatch.training.distributed import ProcessGroup, unsynced
from jacmatch.training.evaluation import find_device
from jacmatch.training.identity import SAMPLES, identity
from jacmatch.training.loggers import logged
from jacmatch.training.state import State, begin, channels_last, make_batches, scale_derivatives

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_USUAL = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.default_int_handler, signal.SIG_DFL)}


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed or SIGTERM was sent inside the block.

    An interrupt in the middle of a step would leave a state that no checkpoint may hold: some weights new, some old. So
    the first interrupt only sets a flag; the second interrupts at once. Outside of the main thread nothing is changed.
    A signal that already has a handler keeps it.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        for each in usual:
            signal.signal(each, signal.default_int_handler)
        noted.append(number)

    here = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in SIGNALS} if here else {}
    usual = {each: handler for each, handler in before.items() if handler in _USUAL[each]}
    for each in usual:
        signal.signal(each, note)
    try:
        yield lambda: bool(noted)
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)
    if noted:
        raise KeyboardInterrupt


def compile_steps(objective: nn.Module, settings: Training) -> CompiledSteps | None:
    """Return the compiler of this objective's steps; None if the settings do not request it.

    If the objective cannot be compiled, a warning and the report give the reason. In a compiled training the student's
    convolutions are laid out channels-last on a GPU, where this layout is faster.
    """
    if isinstance(objective, Objective):
        objective.compiled = None
    if not settings.compile:
        return None
    steps = CompiledSteps(cuda_graphs=settings.cuda_graphs)
    if not isinstance(objective, Objective):
        steps.give_up(f"{type(objective).__name__} is not compiled; the objectives of jacmatch are.")
        return steps
    objective.compiled = steps
    if any(parameter.is_cuda for parameter in objective.parameters()):
        channels_last(objective)
    return steps


_RANKS_APART = 7_919  # between the seeds of two processes
_EARLY = 10  # step of the first checkpoint: a full disk shows in the first minute
_LOG_EVERY = 20

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Fitted:
    """Result of `fit`, including earlier parts of a resumed run.

    Attributes:
        steps: Number of optimizer steps.
        seconds: Wall time, including validation and checkpoints.
        samples_per_second: Throughput of the training, without validation and checkpoints.
        peak_memory_bytes: Peak GPU memory allocated during the call; on the CPU, the peak memory of the whole process.
        finished: Whether all `steps` of the settings were made; if not, the run can be resumed.
        compiled: Report of `CompiledSteps` for this call, if steps are compiled.
    """

    steps: int
    seconds: float
    samples_per_second: float
    peak_memory_bytes: int
    finished: bool
    compiled: dict[str, Any] | None = None


def fit(
    objective: nn.Module,
    train: Split,
    settings: Training,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    validation: Split | None = None,
    on_step: OnStep | None = None,
) -> Fitted:
    """Train `objective.student`, resuming from the run's checkpoint if there is one.

    The student gets its trained weights, or their moving average if `settings.ema` is set. On the CPU they depend bit
    for bit only on the arguments, however often the run was interrupted. torch's random state is seeded during the call
    and restored afterwards.

    Args:
        objective: Has a `student`, is called as `objective(x, y, ids=, draw=, partners=, partner_labels=, progress=)`
            and returns `objectives.Terms`. Its parameters that require gradients are trained.
        train: The training split.
        settings: All settings of the training loop that affect the result.
        seed: Seed of the batches, the augmentation and torch's own random numbers (dropout).
        device: Device to train on; see `find_device`.
        run: Run to which metrics and checkpoints are written; None writes none.
        validation: Split that is evaluated every `validate_every` steps; it does not affect the training.
        on_step: Called after each step with the number of steps and the last metrics that were logged. If it raises
            KeyboardInterrupt, that has the effect of Ctrl-C.

    Raises:
        InputError: The device or precision is not available, the checkpoint belongs to another run, writing fails, or
            the loss or a weight is not finite; the last good checkpoint remains.
        UnsupportedError: The pre-flight check found a fault.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the step is finished and a checkpoint is saved; immediately on
            the second.

    Example:
        >>> from jacmatch.objectives import Distillation
        >>> split = Split(torch.rand(20, 3), torch.arange(20) % 2)
        >>> fit(Distillation(nn.Linear(3, 2)), split, Training(steps=5, batch_size=10), seed=0).steps
        5
    """
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), deferred_interrupt() as interrupted:
        ranks = ProcessGroup.current()
        torch.manual_seed((seed + _RANKS_APART * ranks.rank) % 2**63)
        batches = make_batches(objective, train, settings, seed, device, ranks)
        run = run if run is None or ranks.first else replace(run, follows=True)
        known = {} if run is None else identity(objective, train, seed)
        shown = train.inputs(torch.arange(min(SAMPLES, len(train))))
        state = begin(objective, settings, device, known, shown, ranks)
        compiled = compile_steps(objective, settings)
        if run is not None:
            resume(state, run)
        held_out = None if validation is None else resident(validation, device, settings.resident_mib * 2**20)
        shown_in = logged(settings.logger, run, state, train if held_out is None else held_out)
        with shown_in as (run, show), closing(batches), checks.reported(state, batches, run):
            checks.check_before_training(state, batches, run)
            _loop(state, batches, held_out, run, on_step, interrupted, show)
        state.gather()
        check_finite(objective, checkpoints.remedy(state))
        state.finish()
    seconds = state.elapsed()
    samples = state.step * settings.accumulate * batches.size
    return Fitted(
        steps=state.step,
        seconds=seconds,
        samples_per_second=samples / max(seconds - state.aside, 1e-9),
        peak_memory_bytes=peak_memory(device),
        finished=state.step == settings.steps,
        compiled=None if compiled is None else compiled.report(),
    )


def _loop(
    state: State,
    batches: Batches,
    validation: Split | None,
    run: Run | None,
    on_step: OnStep | None,
    interrupted: Callable[[], bool],
    show: Callable[[], None],
) -> None:
    settings = state.settings
    stop = min(settings.steps, settings.max_steps or settings.steps)
    row: dict[str, float] = {}
    while state.step < stop:
        state.metrics.add(_train_step(state, batches))
        state.step += 1
        checkpoint = state.step in (_EARLY, stop) or state.step % settings.checkpoint_every == 0
        validate = state.step == settings.steps or state.step % settings.validate_every == 0
        if checkpoint or validate or state.step % _LOG_EVERY == 0:
            known = checkpoints.host_figures(state)
            if validate and validation is not None:
                known |= checkpoints.validate(state, validation)
            state.metrics.send(state.step, known)
        row = checkpoints.log_rows(state, run, wait=checkpoint) or row
        if validate and (validation is not None or not settings.shard):  # then this process has the whole student
            show()
        checks.account(state, batches, run)
        if checkpoint and run is not None:
            checkpoints.save_checked(state, run)
        try:
            if on_step is not None:
                on_step(state.step, row)
            stopped = interrupted()
        except KeyboardInterrupt:
            stopped = True
        if state.ranks.any(stopped):
            if run is not None:
                checkpoints.save_checked(state, run)
            raise KeyboardInterrupt


def _train_step(state: State, batches: Batches) -> dict[str, Tensor]:
    """Make one step of the optimizer, and return the terms of the loss, still on the device."""
    settings = state.settings
    for group in state.optimizer.param_groups:
        group["lr"] = settings.lr * factor(state.step, settings)
    sums: dict[str, Tensor] = {}
    before = checks.before(state)
    scale_derivatives(state.objective, state.scale())
    for part in range(settings.accumulate):
        batch = batches(state.step * settings.accumulate + part)
        with unsynced(state.shared, last=part == settings.accumulate - 1):
            # Not through Fabric's wrapper, which inspects every returned tensor: 0.2 ms a step.
            with state.fabric.autocast():
                values, state.shares = state.losses(batch, batches.size)
            loss = values["loss"]
            state.fabric.backward(loss if settings.accumulate == 1 else loss / settings.accumulate)
        for name, value in values.items():
            share = value.detach() if settings.accumulate == 1 else value.detach() / settings.accumulate
            sums[name] = sums[name] + share if name in sums else share
    checks.check_after_backward(state)
    sums |= checks.monitored(state, sums)
    if settings.clip is not None:
        state.fabric.clip_gradients(state.model, state.optimizer, max_norm=settings.clip, error_if_nonfinite=False)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.average is not None and settings.ema is not None:
        _update_average(state.average, state.student, ema_decay(state.step, settings.ema))
    checks.undo(state, before, sums)
    return sums


@torch.no_grad()
def _update_average(average: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the average toward the student; buffers (BatchNorm's statistics are averages already) are copied."""
    for mean, parameter in zip(average.parameters(), student.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)
    for copied, buffer in zip(average.buffers(), student.buffers(), strict=True):
        copied.copy_(buffer)


def peak_memory(device: torch.device) -> int:
    """Return the most GPU memory allocated, or on the CPU the peak of the whole process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # other systems count in KiB
