"""Gradient checkpointing in passes with derivatives: a part is recomputed with the operators of the forward pass.

`torch.utils.checkpoint` runs a part of a network again in a backward pass, which may come after the context of the
forward pass has ended. Without that context other operators would run the second time, with other saved tensors.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils import checkpoint

from jacmatch.errors import UnsupportedError

Contexts = Callable[[], AbstractContextManager[Any]]


class Passes(threading.local):
    """The contexts of the passes that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[tuple[Contexts, bool]] = []


_passes = Passes()


@contextmanager
def recomputed_in(context: Contexts, *, forward: bool) -> Iterator[None]:
    """Parts that are checkpointed within this context are recomputed within `context()`; refused in forward mode."""
    _install()
    _passes.running.append((context, forward))
    try:
        yield
    finally:
        _passes.running.pop()


def _install() -> None:
    """Make checkpoints use the running pass; without one they are unchanged."""
    original = checkpoint._checkpoint_without_reentrant_generator
    if hasattr(original, "uses_running_pass"):
        return

    @wraps(original)
    def generator(
        fn: Any,
        preserve_rng_state: bool = True,
        context_fn: Any = checkpoint.noop_context_fn,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not _passes.running:
            return original(fn, preserve_rng_state, context_fn, *args, **kwargs)
        running, forward = _passes.running[-1]
        if forward and torch.is_grad_enabled():
            raise UnsupportedError("a part is computed again (torch.utils.checkpoint), which loses its tangent.")

        def contexts() -> tuple[Any, Any]:
            forward, again = context_fn()
            return forward, _Both(running, again)

        return original(fn, preserve_rng_state, contexts, *args, **kwargs)

    generator.uses_running_pass = True  # type: ignore[attr-defined]
    checkpoint._checkpoint_without_reentrant_generator = generator


class _Both:
    """The context of the pass, and within it the user's own; entered for each recomputation."""

    def __init__(self, running: Contexts, again: AbstractContextManager[Any]) -> None:
        self.running, self.again = running, again
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.running())
        stack.enter_context(self.again)
        self.entered.append(stack)

    def __exit__(self, *raised: Any) -> bool | None:
        return self.entered.pop().__exit__(*raised)
