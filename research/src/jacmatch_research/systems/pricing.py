"""Two options on several assets: paths with their derivatives, and prices and deltas that are exact.

A path from the state x at time T₁ to maturity T₂ gives a payoff, whose mean is the price at x. The mean of its
derivative with respect to x along the path is the delta, because both payoffs are continuous. One path for each state
is a noisy label and a noisy gradient (Huge & Savine, arXiv 2005.02347).

Units: currency; times in years, volatilities per √year. Interest is zero.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError

Prices = tuple[Float[Tensor, "state 1"], Float[Tensor, "state 1 asset"]]
"""Price (or payoff) and its derivative with respect to each asset."""
_NODES, _COMMON = 64, 40  # nodes of the quadratures over strike and common factor


@dataclass(frozen=True)
class Basket:
    """A call on a weighted sum of assets in the model of Bachelier: S(T₂) = x + σ√τ·Lz, LLᵀ = ρ, τ = T₂ − T₁.

    Weights add up to 1. States are at T₁, `start`, and spread `spread` times as wide as the model would spread them.
    """

    weights: Float[Tensor, "asset"]
    volatilities: Float[Tensor, "asset"]
    correlation: Float[Tensor, "asset asset"]
    strike: float = 1.1
    start: float = 1.0
    maturity: float = 2.0
    spread: float = 1.5
    spot: float = 1.0

    @classmethod
    def drawn(cls, assets: int, seed: int, *, volatility: float = 0.2) -> "Basket":
        """A basket drawn as in section 3.1 of Huge & Savine (and of their notebooks).

        Weights uniform in [1, 10] up to a factor, volatilities uniform in [5, 50] up to the factor that gives the
        basket `volatility`, correlation that of a random matrix with entries uniform in [−1, 1].

        Raises:
            InputError: `assets` is below 1.

        Example:
            >>> basket = Basket.drawn(7, seed=0)
            >>> round(float(basket.deviation(1.0)), 6), round(float(basket.weights.sum()), 6)
            (0.2, 1.0)
        """
        if assets < 1:
            raise InputError("`assets` of `Basket.drawn` must be at least 1.", got=assets)
        random = np.random.default_rng(seed)
        factor = random.uniform(-1, 1, (2 * assets, assets))
        covariance = factor.T @ factor
        inverse = 1 / np.sqrt(np.diag(covariance))
        weights = random.uniform(1, 10, assets)
        volatilities = random.uniform(5, 50, assets)
        correlation = covariance * np.outer(inverse, inverse)
        weights /= weights.sum()
        parts = weights * volatilities
        volatilities *= volatility / np.sqrt(parts @ correlation @ parts)
        return cls(torch.from_numpy(weights), torch.from_numpy(volatilities), torch.from_numpy(correlation))

    def deviation(self, time: float) -> Float[Tensor, ""]:
        """Standard deviation of the basket after a time."""
        parts = self.weights * self.volatilities
        return (parts @ self.correlation @ parts * time).sqrt()

    def states(self, count: int, seed: int) -> Float[Tensor, "state asset"]:
        """States at T₁."""
        return self.spot + self.spread * math.sqrt(self.start) * self._noise(count, seed)

    def paths(self, x: Float[Tensor, "state asset"], seed: int) -> Prices:
        """The payoff (B − K)₊ of one path from each state, B = Σ wᵢSᵢ(T₂), and its derivatives 1{B > K} wᵢ."""
        end = x + math.sqrt(self.maturity - self.start) * self._noise(len(x), seed)
        above = end @ self.weights - self.strike
        inside = (above > 0).to(x.dtype)
        return above.relu()[:, None], (inside[:, None] * self.weights)[:, None]

    def exact(self, x: Float[Tensor, "state asset"]) -> Prices:
        """Bachelier's price s(dΦ(d) + φ(d)), s = σ_B√τ and d = (B − K)/s, and the deltas wᵢΦ(d)."""
        scale = self.deviation(self.maturity - self.start)
        d = (x @ self.weights - self.strike) / scale
        below = torch.special.ndtr(d)
        price = scale * (d * below + _density(d))
        return price[:, None], (below[:, None] * self.weights)[:, None]

    def _noise(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, len(self.weights), generator=generator, dtype=torch.float64)
        return self.volatilities * (z @ _root(self.correlation).T)


@dataclass(frozen=True)
class WorstOf:
    """A put on the worst of several assets in the model of Black and Scholes, whose noise has one common factor.

    Sᵢ(T₂) = xᵢ exp(−½σᵢ²τ + σᵢ√τ(√ρ z₀ + √(1−ρ) zᵢ)) with τ = T₂ − T₁ and independent normal z; ρ, in [0, 1),
    correlates the noise of any two. States are at T₁, `start`, drawn with volatilities that are `spread` times as
    large.
    """

    volatilities: Float[Tensor, "asset"]
    correlation: float = 0.5
    strike: float = 1.0
    start: float = 1.0
    maturity: float = 2.0
    spread: float = 1.5
    spot: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise InputError("`correlation` of `WorstOf` must be in [0, 1).", got=self.correlation)

    def states(self, count: int, seed: int) -> Float[Tensor, "state asset"]:
        """States at T₁."""
        return self.spot * self._growth(count, seed, self.spread * self.volatilities, self.start)

    def paths(self, x: Float[Tensor, "state asset"], seed: int) -> Prices:
        """The payoff (K − minᵢ Sᵢ(T₂))₊ of one path from each state, and its derivatives −1{Sᵢ = min < K} Sᵢ/xᵢ."""
        growth = self._growth(len(x), seed, self.volatilities, self.maturity - self.start)
        worst, which = (x * growth).min(1)
        below = self.strike - worst
        gradient = torch.zeros_like(x).scatter(1, which[:, None], -growth.gather(1, which[:, None]))
        return below.relu()[:, None], (gradient * (below > 0)[:, None])[:, None]

    def exact(self, x: Float[Tensor, "state asset"]) -> Prices:
        """Price ∫₀ᴷ P(min < s) ds and its derivatives, by quadrature over s and over the common factor.

        P(min < s) = 1 − E₀ Πᵢ Φ(aᵢ), aᵢ = (ln(xᵢ/s) − ½σᵢ²τ)/(σᵢ√(τ(1−ρ))) + z₀√(ρ/(1−ρ)). The accuracy is
        10⁻⁹ of the strike (Gauss–Legendre and Gauss–Hermite).
        """
        parts = [self._exact(part) for part in torch.split(x, 64)]
        price, deltas = (torch.cat(each) for each in zip(*parts, strict=True))
        return price, deltas

    def _exact(self, x: Tensor) -> Prices:
        strikes, weights = _legendre(self.strike)
        common, chances = _hermite()
        own = self.volatilities * math.sqrt((self.maturity - self.start) * (1 - self.correlation))
        drift = self.volatilities**2 * (self.maturity - self.start) / 2
        a = ((x[:, None] / strikes[:, None]).log() - drift) / own  # state, strike, asset
        a = a[:, :, None] + (common * math.sqrt(self.correlation / (1 - self.correlation)))[:, None]
        above = torch.special.ndtr(a)
        both = weights[:, None] * chances  # strike, factor
        price = self.strike - (above.prod(-1) * both).sum((1, 2))
        deltas = torch.empty_like(x)
        for asset in range(x.shape[1]):
            others = torch.cat((above[..., :asset], above[..., asset + 1 :]), -1).prod(-1)
            density = (others * _density(a[..., asset]) * both).sum((1, 2))
            deltas[:, asset] = -density / (own[asset] * x[:, asset])
        return price[:, None], deltas[:, None]

    def _growth(self, count: int, seed: int, volatilities: Tensor, time: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, 1 + len(volatilities), generator=generator, dtype=torch.float64)
        noise = math.sqrt(self.correlation) * z[:, :1] + math.sqrt(1 - self.correlation) * z[:, 1:]
        return (volatilities * math.sqrt(time) * noise - volatilities**2 * time / 2).exp()


OPTIONS: dict[str, Basket | WorstOf] = {
    "basket call, Bachelier": Basket.drawn(7, seed=0),
    "worst-of put, Black-Scholes": WorstOf(torch.tensor([0.15, 0.2, 0.25, 0.3], dtype=torch.float64)),
}
"""The options of the experiment: seven assets by the law of Huge & Savine; four assets of 15 to 30 % a year, ours."""


def _density(d: Tensor) -> Tensor:
    return (-d.square() / 2).exp() / math.sqrt(2 * math.pi)


def _root(matrix: Tensor) -> Tensor:
    """L with LLᵀ = matrix."""
    root: Tensor = torch.linalg.cholesky(matrix)
    return root


def _legendre(strike: float) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(_NODES))
    return (nodes + 1) * strike / 2, weights * strike / 2


def _hermite() -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(_COMMON))
    return nodes, weights / weights.sum()
