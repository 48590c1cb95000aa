"""A scikit-learn estimator that learns a smooth function from values and partials."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jacmatch.errors import InputError
from jacmatch.models.catalog import optional_package
from jacmatch.surrogates import samples
from jacmatch.surrogates.perceptron import ACTIVATIONS, Values
from jacmatch.surrogates.solver import DECAYS, OnProgress, fit_network


class JacobianRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A network fitted to the values and, where known, the partials of a smooth function.

    The fit is deterministic: L-BFGS in float64 over all samples; weight decay and activation are selected on held-out
    values and partials.

    Args:
        hidden: Widths of the hidden layers.
        activation: "silu", "tanh", "softplus", or "auto", which selects one on held-out samples.
        starts: Random starts for each activation; the best on held-out samples is fitted to all.
        weight_decay: A number, or "auto", which selects it on held-out samples.
        jacobian_weight: Weight λ of the partials beside values of weight 1, in standardized units. "auto" takes the one
            at which a constant function loses as much by its partials as by its values.
        output_weights: Weight of each output's squared error, (K,); it applies to its partials as well.
        partial_weights: Weight of each partial's squared error, broadcast to (N, K, D).
        ensemble: Networks from different starts, whose mean is the prediction; 2 or more give a standard deviation.
        max_evaluations: Evaluations of loss and gradient in the last fit; by the size of the problem if None.
        warm_start: Whether a second `fit` goes on from the parameters of the first.
        random_state: Seed of the starts and of what is held out.
        on_progress: Called after each evaluation with their number, the number planned and the loss.

    Attributes:
        fits_: The networks, with what they were selected by.
        scaler_: Means and scales of inputs and outputs.
        warnings_: One line for each thing about the samples that looked wrong.
        n_features_in_: The number of inputs.

    References:
        Czarnecki et al. 2017, arXiv 1706.04859 (Sobolev training); Nocedal 1980 (L-BFGS).

    Example:
        >>> x = np.linspace(0, 3, 12)[:, None]
        >>> model = JacobianRegressor(hidden=(8,), max_evaluations=200)
        >>> model.fit(x, np.sin(x[:, 0]), jacobian=np.cos(x)).predict(x).shape
        (12,)
        >>> model.predict_jacobian(x).shape
        (12, 1)
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (32, 32),
        activation: str = "silu",
        starts: int = 2,
        weight_decay: float | str = "auto",
        jacobian_weight: float | str = "auto",
        output_weights: Any = None,
        partial_weights: Any = None,
        ensemble: int = 1,
        max_evaluations: int | None = None,
        warm_start: bool = False,
        random_state: Any = 0,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Store the settings; `fit` checks them."""
        self.hidden = hidden
        self.activation = activation
        self.starts = starts
        self.weight_decay = weight_decay
        self.jacobian_weight = jacobian_weight
        self.output_weights = output_weights
        self.partial_weights = partial_weights
        self.ensemble = ensemble
        self.max_evaluations = max_evaluations
        self.warm_start = warm_start
        self.random_state = random_state
        self.on_progress = on_progress

    def fit(self, X: Any, y: Any, jacobian: Any = None, sample_weight: Any = None) -> "JacobianRegressor":
        """Fit to values and partials.

        Args:
            X: Inputs, (N, D).
            y: Values, (N,) or (N, K).
            jacobian: Partials ∂yₖ/∂xᵢ, (N, K, D), or (N, D) for one output; NaN where not known. None learns values.
            sample_weight: Weight of each sample, (N,).

        Raises:
            InputError: The samples cannot be learned from, or a setting is wrong.
        """
        x, values = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        values = values.astype(np.float64)
        self._flat = values.ndim == 1
        named = getattr(y, "columns", None)
        self._outputs = [getattr(y, "name", None) or "y"] if named is None else [str(name) for name in named]
        values = values.reshape(len(x), -1)
        j = None if jacobian is None else samples.check_jacobian(jacobian, len(x), values.shape[1], x.shape[1])
        self._check()
        self.warnings_ = samples.warn_about(x, values, j)
        data, self.scaler_ = samples.standardize(
            x,
            values,
            j,
            sample_weight=sample_weight,
            output_weights=self.output_weights,
            partial_weights=self.partial_weights,
            jacobian_weight=self.jacobian_weight,
        )
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        before = getattr(self, "fits_", None) if self.warm_start else None
        if before is not None and len(before) != self.ensemble:
            before = None
        self.fits_ = [
            fit_network(
                data,
                tuple(self.hidden),
                activations=list(ACTIVATIONS) if self.activation == "auto" else [self.activation],
                starts=self.starts if before is None else 1,
                decays=DECAYS if self.weight_decay == "auto" else (float(self.weight_decay),),
                seed=int(seed) + 1000 * number,
                evaluations=self.max_evaluations,
                initial=None if before is None else before[number].theta,
                on_progress=self.on_progress,
            )
            for number in range(self.ensemble)
        ]
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return values, (N,) or (N, K) as in `fit`; with `return_std` also their standard deviation.

        Raises:
            InputError: A standard deviation is wanted of a single network.
        """
        y, std, _ = self._evaluate(X, jacobian=False, std=return_std)
        if self._flat:
            y, std = y[:, 0], None if std is None else std[:, 0]
        return (y, std) if return_std else y

    def predict_jacobian(self, X: Any) -> Float[ndarray, "sample *out input"]:
        """Return partials, (N, K, D), or (N, D) where `fit` got y as (N,)."""
        *_, j = self._evaluate(X, jacobian=True, std=False)
        assert j is not None
        return np.asarray(j[:, 0] if self._flat else j)

    def predict_frame(self, X: Any, *, jacobian: bool = False, return_std: bool = False) -> Any:
        """Return predictions as a pandas frame with the index of X.

        Args:
            X: Inputs, a frame.
            jacobian: Whether the partials follow, in columns "dy/dx".
            return_std: Whether standard deviations follow, in columns "y_std".

        Raises:
            InputError: pandas is not installed, or a standard deviation is wanted of a single network.
        """
        pandas = optional_package("pandas", "`predict_frame`", "pip install pandas")
        y, std, j = self._evaluate(X, jacobian=jacobian, std=return_std)
        outputs = self._outputs if len(self._outputs) == y.shape[1] else [f"y{k}" for k in range(y.shape[1])]
        inputs = getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])
        columns = {name: y[:, k] for k, name in enumerate(outputs)}
        if std is not None:
            columns |= {f"{name}_std": std[:, k] for k, name in enumerate(outputs)}
        if j is not None:
            columns |= {f"d{o}/d{i}": j[:, k, d] for k, o in enumerate(outputs) for d, i in enumerate(inputs)}
        return pandas.DataFrame(columns, index=getattr(X, "index", None))

    def _evaluate(self, X: Any, *, jacobian: bool, std: bool) -> tuple[Values, Values | None, samples.Jacobian | None]:
        check_is_fitted(self)
        x = self.scaler_.inputs(validate_data(self, X, reset=False, dtype=np.float64))
        if std and len(self.fits_) < 2:
            rule = "`predict(X, return_std=True)` of `JacobianRegressor` needs an ensemble."
            raise InputError(rule, got=f"ensemble={len(self.fits_)}", do="Set ensemble=5.")
        found = [fit.net(fit.theta, x, jacobian=jacobian) for fit in self.fits_]
        y = np.mean([each[0] for each in found], axis=0)
        spread = np.std([each[0] for each in found], axis=0, ddof=1) * self.scaler_.y_scale if std else None
        j = (
            self.scaler_.jacobian(np.mean([each[1] for each in found if each[1] is not None], axis=0))
            if jacobian
            else None
        )
        return self.scaler_.outputs(y), spread, j

    def _check(self) -> None:
        """Refuse settings that are out of range."""
        for name in ("starts", "ensemble"):
            if getattr(self, name) < 1:
                rule = f"`{name}` of `JacobianRegressor` must be at least 1."
                raise InputError(rule, got=getattr(self, name))
        for name in ("weight_decay", "jacobian_weight"):
            given = getattr(self, name)
            if given != "auto" and (isinstance(given, str) or not 0 <= given < np.inf):
                rule = f'`{name}` of `JacobianRegressor` must be "auto" or a finite number of at least 0.'
                raise InputError(rule, got=repr(given))
