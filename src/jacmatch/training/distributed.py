"""Several processes that train one network: rendezvous, shared state, DDP and FSDP2.

Each process gets every n-th sample of each batch. PyTorch averages the gradients; the terms are scaled so that the
average is the gradient of the whole batch, even if it was split unevenly.

A process that fails writes its error to the store of the job and exits. The others lose the connection, read the store,
and exit with the same code.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from jacmatch.errors import ElsewhereError, InputError, UnsupportedError, converted_errors
from jacmatch.objectives import Objective, Terms
from jacmatch.objectives.base import networks_of
from jacmatch.objectives.terms import Part
from jacmatch.training.configuration import Training
from jacmatch.training.data import Batch
from jacmatch.training.evaluation import find_device

_LONG = timedelta(days=1)  # one process may evaluate, or train nothing, for hours while the others wait for it
_control: dict[str, Any] = {}


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one network together, and which of them this is.

    Example:
        >>> ranks = ProcessGroup.current()
        >>> ranks.first, ranks.any(True), ranks.broadcast({"lr": 0.1})
        (True, True, {'lr': 0.1})
    """

    rank: int = 0  # from 0
    size: int = 1  # how many there are
    # A gloo group for values on the host; None for a single process
    group: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def current(cls) -> "ProcessGroup":
        """Return the group of this process, from `torch.distributed`. All processes must make the first call."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        world = distributed.group.WORLD
        if _control.get("world") is not world:
            _control.update(world=world, group=distributed.new_group(backend="gloo", timeout=_LONG))
        return cls(distributed.get_rank(), distributed.get_world_size(), _control["group"])

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return bool(self._reduced(int(flag), distributed.ReduceOp.MAX)) if self.size > 1 else flag

    def broadcast(self, value: Any) -> Any:
        """Return the value of the first process, which must be JSON; the values of the others are ignored."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        length = torch.tensor(len(text))
        distributed.broadcast(length, 0, group=self.group)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        distributed.broadcast(content, 0, group=self.group)
        return json.loads(bytes(content.tolist()))

    def barrier(self) -> None:
        """Block until all processes have called this."""
        self.any(False)

    def same(self, name: str, value: int | str) -> None:
        """Check that a value is the same in all processes."""
        if self.size == 1:
            return
        if isinstance(value, str):
            value = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        least, most = (self._reduced(value, kind) for kind in (distributed.ReduceOp.MIN, distributed.ReduceOp.MAX))
        if least != most:
            rule = f"All {self.size} processes of a job must have the same {name}."
            do = "Give them the same files: --out, data and caches on a file system that all nodes share."
            raise InputError(rule, got=f"{least} and {most}", do=do)

    def all_reduce(self, table: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.size > 1:
            distributed.all_reduce(table, group=self.group if table.device.type == "cpu" else None)
        return table

    def all_gather(self, row: Tensor) -> Tensor:
        """Stack the rows of all processes; with one process return that row."""
        if self.size == 1:
            return row
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row, group=self.group)
        return torch.stack(rows)

    def broadcast_buffers(self, modules: Iterable[nn.Module | None]) -> None:
        """Copy the buffers of the first process to all."""
        for module in modules if self.size > 1 else ():
            for buffer in [] if module is None else module.buffers():
                distributed.broadcast(buffer.detach(), 0)

    def _reduced(self, value: int, kind: Any) -> int:
        number = torch.tensor(value, dtype=torch.int64)
        distributed.all_reduce(number, kind, group=self.group)
        return int(number)


class Shared(nn.Module):
    """An objective for a part of each batch, which returns only tensors, of which only the loss has a graph."""

    def __init__(self, objective: nn.Module, ranks: ProcessGroup) -> None:
        super().__init__()
        self.objective, self.ranks = objective, ranks
        self.shares: dict[str, float] = {}

    def forward(self, batch: Batch, samples: int, progress: float) -> dict[str, Tensor]:
        """The terms: their mean over the processes is that over the batch, of `samples` samples."""
        part = Part(self.ranks.rank, self.ranks.size, samples)
        with self.objective.loss_weights.in_part(part) if isinstance(self.objective, Objective) else nullcontext():
            terms: Terms = self.objective(batch.x, batch.y, **batch.keywords(), progress=progress)
        self.shares = terms.shares
        values = terms.of_part(part)
        return {name: value if name == "loss" else value.detach() for name, value in values.items()}


def distribute(objective: nn.Module, ranks: ProcessGroup, device: torch.device) -> DistributedDataParallel:
    """The objective as DDP runs it, on its device."""
    without_synchronized_statistics(objective)
    with warnings.catch_warnings():
        return DistributedDataParallel(
            Shared(objective, ranks),
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=True,  # a Jacobian term gives biases no gradient at all
        )


def unsynced(model: nn.Module | None, last: bool) -> AbstractContextManager[object]:
    """Keep gradients in this process inside the block, unless this is the last part of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def without_synchronized_statistics(objective: nn.Module) -> None:
    """Refuse SyncBatchNorm if derivatives with respect to the input are computed."""
    names = [name for name, layer in objective.named_modules() if isinstance(layer, nn.SyncBatchNorm)]
    engine = objective.resolved_engine() if isinstance(objective, Objective) else None
    if names and engine not in (None, "differences"):
        raise UnsupportedError(
            f"`student` must not have SyncBatchNorm ({names[0]!r}) where its derivatives are compared: it has no "
            "second derivative and no forward-mode rule. Use nn.BatchNorm2d, whose statistics are then those of each "
            "process's part, a network without BatchNorm, or --engine differences."
        )


def sharded(objective: nn.Module, ranks: ProcessGroup, device: torch.device) -> Shared:
    """Shard a copy of the objective (FSDP2): one unit for each child of the student, and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import

    if ranks.size == 1:
        rule = "`shard` of `Training` needs several processes, over which the weights are sharded."
        raise InputError(rule, got="one", do="Start more (--devices N, or torchrun).")
    without_synchronized_statistics(objective)
    _, teacher = networks_of(objective)
    trained: Any = copy.deepcopy(objective, {id(teacher): teacher})
    trained = trained.to(device).train()
    if isinstance(trained, Objective):
        trained.check_sharded()
    mesh = init_device_mesh(device.type, (ranks.size,))
    for child in trained.student.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh)
    unit = Shared(trained, ranks)
    fully_shard(unit, mesh=mesh)
    return unit


def check_shardable(settings: Training) -> None:
    """Refuse settings that cannot be combined with FSDP2."""
    for name, wrong in {
        "ema": settings.ema,
        "compile": settings.compile,
        "precision": settings.precision == "fp16",
        "on_not_finite": settings.on_not_finite == "skip",
    }.items():
        if wrong:
            rule = f"`shard` of `Training` cannot be combined with `{name}`={getattr(settings, name)!r}."
            raise UnsupportedError(rule)


def gather(unit: Shared, objective: nn.Module) -> None:
    """Copy the sharded weights and state into the whole objective, in all processes."""
    objective.load_state_dict(whole(unit.objective.state_dict()))


def scatter(unit: Shared, objective: nn.Module) -> None:
    """Shard the weights and the state of the whole objective."""
    own = unit.objective.state_dict()
    unit.objective.load_state_dict({name: _like(value, own[name]) for name, value in objective.state_dict().items()})


def whole(state: Any) -> Any:
    """Return the state with full tensors, in all processes."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def cut(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard an optimizer state from `whole` like the parameters of this optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: _like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def _like(value: Any, own: Any) -> Any:
    """Shard a tensor like a sharded one of its shape; return other values unchanged."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


STORE = "JACMATCH_STORE"
"""Environment variable with the store file of a job that the command line has started; torchrun has its own."""
ERROR = "jacmatch-error"
"""Key of the first error of the job in the store."""
_PATIENCE = timedelta(minutes=10)  # maximum wait for the other processes in a step: one may still be compiling
_BETWEEN, _FORCE = 1.0, 30.0  # seconds between two checks of the launcher, and until an end without saving
_ERROR_WITHIN = 5.0  # seconds to wait for the error of another process in the store
_OF_CONNECTIONS = re.compile(r"gloo|nccl|connection|broken pipe|tim(ed|e) ?out|store", re.IGNORECASE)
_GONE = (
    "a process of this job has ended, or cannot be reached any more ({reason}). See its last message; the "
    "system may have killed it for lack of memory."
)


def is_of_connections(error: BaseException) -> bool:
    """Return whether an error may come from another process of the job that has ended."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return several and isinstance(error, RuntimeError) and bool(_OF_CONNECTIONS.search(str(error)))


def rank_and_size() -> tuple[int, int]:
    """Return rank and number of the processes from the environment that torchrun sets, (0, 1) without it."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (all(each.isdecimal() for each in given) and int(given[0]) < int(given[1])):
        rule = "The environment's RANK must be an integer below WORLD_SIZE."
        do = "torchrun sets both. Without torchrun, unset both."
        raise InputError(rule, got=f"{given[0]!r} and {given[1]!r}", do=do)
    return int(given[0]), int(given[1])


@contextlib.contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """Within the block, this process is a member of the group that torchrun or the command line started.

    GPUs communicate with NCCL, process n of a machine on GPU n; CPUs with gloo.
    """
    rank, size = rank_and_size()
    if size == 1 or distributed.is_initialized():
        yield ProcessGroup.current()
        return
    cuda = _own_gpu(device)
    store = _store(rank, size)
    if STORE in os.environ:
        _end_with_launcher()
    kind = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        distributed.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        yield ProcessGroup.current()
    except BaseException as error:
        raise _first(store, rank, error) from error
    finally:
        with contextlib.suppress(Exception):  # a broken group may fail to shut down
            distributed.destroy_process_group()


def _end_with_launcher() -> None:
    """End this process as SIGTERM does, with a checkpoint, when the launcher has ended."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_BETWEEN)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_FORCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="jacmatch-launcher").start()


def _own_gpu(device: str) -> bool:
    """Select the GPU of this process; return whether the job runs on GPUs."""
    if find_device(device).type == "cpu":
        return False
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if ":" in device:
        raise InputError("`device` must not name one GPU for several processes.", got=device, do="Use --device cuda.")
    if local >= gpus:
        rule = "There must be a GPU for each process of a machine."
        raise InputError(rule, got=f"{gpus} for {os.environ.get('LOCAL_WORLD_SIZE', local + 1)}", do="Start fewer.")
    torch.cuda.set_device(local)
    return True


def _store(rank: int, size: int) -> distributed.Store:
    """Open the store of the job: that of the command line, of torchrun's agent, or of the first process."""
    rule = "MASTER_ADDR and MASTER_PORT must be the address at which the processes of this job meet."
    with converted_errors(rule, "Start them with torchrun.", of=(KeyError, ValueError, RuntimeError)):
        if STORE in os.environ:
            return distributed.FileStore(os.environ[STORE], -1)  # type: ignore[attr-defined]
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = distributed.TCPStore(host, int(port), size, is_master=ours)  # type: ignore[attr-defined]
        return distributed.PrefixStore(f"jacmatch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]


def _first(store: distributed.Store, rank: int, error: BaseException) -> BaseException:
    """Return the exception to end with, given the error of this process: that error if it is the first of the job."""
    if isinstance(error, ElsewhereError):
        return error
    meant = isinstance(error, InputError | UnsupportedError)
    code = 2 if meant else 130 if isinstance(error, KeyboardInterrupt) else 1
    lost = isinstance(error, RuntimeError) and not meant and bool(_OF_CONNECTIONS.search(str(error)))
    own = json.dumps({"rank": rank, "code": code})
    try:
        until = time.monotonic() + _ERROR_WITHIN
        while lost and time.monotonic() < until and not store.check([ERROR]):
            time.sleep(0.05)
        first = store.compare_set(ERROR, "", own).decode()
    except RuntimeError:  # the process that had the store has ended
        first = own
    first_code = json.loads(first)["code"]
    if (first_code == 130 and rank == 0) or (first == own and code == 130):
        return KeyboardInterrupt() if rank == 0 else ElsewhereError(130)
    if first != own:
        return ElsewhereError(first_code)
    if lost:
        reason = " ".join(str(error).split())[:200]
        return ElsewhereError(code, _GONE.format(reason=reason))
    return error
