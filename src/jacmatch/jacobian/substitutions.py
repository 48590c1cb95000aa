"""Derivatives for text: along the replacement of one token by another, in each network's own embeddings.

Token ids have no derivative. The direction "token j instead of token i at position p" is E[j] − E[i] in the table E of
a network. Student and teacher must share a tokenizer; their embedding sizes may differ. With coefficients z of k
directions,

    f(z) = network(E[ids] + Σₘ zₘ (E[jₘ] − E[iₘ]) at position pₘ),   J = ∂f/∂z at z = 0, (B, R, k),

so that every probe, engine and loss works for text as for images. E is trained like any other parameter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import probes
from jacmatch.jacobian.arguments import Substituted
from jacmatch.jacobian.estimators import Cost, Estimator, RandomOutputs, Side, check_count

Neighbours: TypeAlias = Callable[[Int[Tensor, "batch token"], Int[Tensor, "batch one"]], Int[Tensor, "batch one many"]]
"""Candidates to replace the tokens at positions of the batch."""


@dataclass(frozen=True)
class TokenSubstitutions:
    """k = `count` replacements of a token by another for each text, new ones in each draw.

    The inputs of the objective are then token ids (B, T), and derivatives are taken with respect to the coefficients of
    the k directions, all with equal weight. Replaced positions are drawn from those of the attention mask whose token
    is not special; for a text without such positions, the derivatives are 0.

    Attributes:
        count: k.
        candidates: Source of the new token: the tokens of the `batch`, the whole vocabulary (`random`), or a function
            such as `MaskedNeighbours`, which returns candidates for each position.
        special: Tokens that are neither replaced nor used, such as padding, start and separation tokens.
        rows: Which products of the Jacobian (R, k) are compared. vᵀJ is one backward pass for all k.
        mask: The key of the attention mask in the context.

    Raises:
        InputError: `count` is below 1, or `candidates` is unknown.

    Example:
        >>> from jacmatch import Distillation
        >>> def network(width):
        ...     return nn.Sequential(nn.Embedding(20, width), nn.Flatten(), nn.Linear(5 * width, 3))
        >>> objective = Distillation(network(4), network(8), jacobians=1.0, probe=TokenSubstitutions(4))
        >>> objective(torch.randint(20, (6, 5)), torch.arange(6) % 3).keys()
        ['loss', 'labels', 'outputs', 'jacobians']
    """

    count: int = 4
    candidates: Literal["batch", "random"] | Neighbours = "batch"
    special: tuple[int, ...] = ()
    rows: Estimator = field(default_factory=RandomOutputs)
    mask: str = "attention_mask"

    def __post_init__(self) -> None:
        check_count("TokenSubstitutions", self.count)
        if not callable(self.candidates) and self.candidates not in ("batch", "random"):
            rule = "`candidates` of `TokenSubstitutions` must be 'batch', 'random' or a function."
            raise InputError(rule, got=repr(self.candidates), do="For example MaskedNeighbours(model, mask_token).")

    @property
    def side(self) -> Side:
        """The side of `rows`."""
        return self.rows.side

    def directions(self, **about: Any) -> Float[Tensor, "probe batch *shape"]:
        """Return the directions of `rows`."""
        return self.rows.directions(**about)

    def variance(self, matrix: Float[Tensor, "row column"], **about: Any) -> float:
        """Return the variance of `rows`, for given substitutions."""
        return self.rows.variance(matrix, **about)

    def passes(self, outputs: int) -> Cost:
        """Return the passes of `rows`."""
        return self.rows.passes(outputs)

    def drawn(
        self,
        tokens: Int[Tensor, "batch token"],
        *,
        ids: Int[Tensor, "batch"],
        seed: int,
        draw: int,
        context: Mapping[str, Any],
        vocabulary: int,
    ) -> Substituted:
        """Return the substitutions of a batch."""
        special = torch.tensor(self.special, dtype=tokens.dtype, device=tokens.device)
        free = ~torch.isin(tokens, special)
        if isinstance(mask := context.get(self.mask), Tensor):
            free = free & (mask.reshape(free.shape) != 0)
        uniform = probes.uniform(seed, ids, draw, 2 * self.count).double()
        where, which = uniform[:, : self.count], uniform[:, self.count :]
        number = free.sum(1, keepdim=True)
        order = (~free).to(torch.int8).argsort(dim=1, stable=True)  # the free positions first
        positions = order.gather(1, (where * number).long().clamp_max(tokens.shape[1] - 1))
        if callable(self.candidates):
            many = self.candidates(tokens, positions)
            new = many.gather(2, (which * many.shape[2]).long()[..., None])[..., 0]
        else:
            pool = torch.unique(tokens[free]) if self.candidates == "batch" else torch.arange(vocabulary).to(tokens)
            pool = pool[~torch.isin(pool, special)]
            if not len(pool):
                raise InputError("`TokenSubstitutions` must have tokens to choose from.", do="Reduce `special`.")
            new = pool[(which * len(pool)).long()]
        old = tokens.gather(1, positions)
        keep = (number == 0) | torch.isin(new, special)
        return Substituted(tokens, positions, torch.where(keep, old, new))


@dataclass(frozen=True)
class MaskedNeighbours:
    """Candidates for `TokenSubstitutions`: the predictions of a masked language model at the position.

    Attributes:
        model: Token ids to logits (B, T, vocabulary), or an object with `logits`.
        mask_token: The id of the mask token.
        top: Number of candidates, the most likely ones.
    """

    model: nn.Module
    mask_token: int
    top: int = 10

    def __call__(
        self, tokens: Int[Tensor, "batch token"], positions: Int[Tensor, "batch one"]
    ) -> Int[Tensor, "batch one many"]:
        """Return the candidates of each position, masking one position at a time."""
        batch, count = positions.shape
        hidden = tokens.repeat_interleave(count, 0)
        hidden.scatter_(1, positions.reshape(-1, 1), self.mask_token)
        with torch.no_grad():
            returned = self.model(hidden)
        logits = returned if isinstance(returned, Tensor) else returned.logits
        at = logits[torch.arange(len(hidden), device=tokens.device), positions.flatten()]
        return at.topk(self.top, dim=1).indices.view(batch, count, self.top)
