"""A scikit-learn estimator that learns a smooth function from values and partials."""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin, clone
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jacmatch.errors import InputError, optional_package, unknown_name, whole_number
from jacmatch.surrogates import gaussian_process, samples
from jacmatch.surrogates.perceptron import Cotangents, Inputs, Perceptron, Values
from jacmatch.surrogates.solver import (
    DECAYS,
    Fit,
    OnProgress,
    Selection,
    Standardized,
    layouts,
    select_network,
    too_large,
)
from jacmatch.surrogates.tables import check_columns

MODELS = ("auto", "network", "gp")
SOLVERS = ("auto", "lbfgs", "adam")


class JacobianRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regressor fitted to values and, where known, partials of a smooth function.

    The model is a network or a Gaussian process, and the fit is deterministic. A network is fitted by L-BFGS in float64
    over all samples; weight decay and activation are selected on held-out values and partials.

    Args:
        model: "network"; "gp", a Gaussian process, for up to about 6,000 values and partials per output; or "auto", the
            one with the lower error on held-out samples.
        solver: "lbfgs", over all samples in each evaluation; "adam", in minibatches; or "auto", which selects "adam"
            for large data, noisy values and GPUs.
        steps: Steps of Adam.
        device: Device for solver "adam".
        hidden: Widths of the hidden layers.
        activation: "silu", "tanh", "softplus" or "sine". "auto" selects between SiLU and one layer of as many sines, on
            held-out samples; "all" also tries tanh and softplus.
        starts: Number of random initializations for each activation; the best on held-out samples is fitted to all
            samples.
        weight_decay: A number, or "auto", which selects it on held-out samples.
        jacobian_weight: Weight λ of the partials in standardized units; the values have weight 1. "auto": the weight at
            which both terms are equal for a constant function.
        output_weights: Weight of the squared error of each output, (K,); it also applies to its partials.
        partial_weights: Weight of the squared error of each partial, broadcast to (N, K, D).
        ensemble: Number of networks with different initializations, whose mean is the prediction.
        max_evaluations: Maximum number of evaluations of loss and gradient in the last fit; None: by the size of the
            problem.
        warm_start: Whether a second `fit` continues from the parameters of the first.
        random_state: Seed of the initializations and of the held-out samples.
        on_progress: Called after each evaluation with the number of evaluations, the planned number and the loss.

    Attributes:
        model_: "network" or "gp": the model that predicts.
        solver_: The solver, and why it was selected.
        fits_: The networks and the losses by which they were selected; empty if a Gaussian process predicts.
        process_: The Gaussian process; None if there is none.
        held_out_: Held-out loss of network and process, if both were fitted.
        scaler_: Means and scales of inputs and outputs.
        warnings_: One line for each problem of the samples.

    References:
        Czarnecki et al. 2017, arXiv 1706.04859 (Sobolev training).

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
        model: str = "auto",
        solver: str = "auto",
        hidden: tuple[int, ...] = (24, 24, 24),
        activation: str = "auto",
        starts: int = 1,
        weight_decay: float | str = "auto",
        jacobian_weight: float | str = "auto",
        output_weights: Any = None,
        partial_weights: Any = None,
        ensemble: int = 1,
        max_evaluations: int | None = None,
        steps: int = 3000,
        device: str = "cpu",
        warm_start: bool = False,
        random_state: Any = 0,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Store the settings; `fit` checks them."""
        self.model = model
        self.solver = solver
        self.hidden = hidden
        self.activation = activation
        self.starts = starts
        self.weight_decay = weight_decay
        self.jacobian_weight = jacobian_weight
        self.output_weights = output_weights
        self.partial_weights = partial_weights
        self.ensemble = ensemble
        self.max_evaluations = max_evaluations
        self.steps = steps
        self.device = device
        self.warm_start = warm_start
        self.random_state = random_state
        self.on_progress = on_progress

    def fit(
        self, X: Any, y: Any, jacobian: Any = None, sample_weight: Any = None, cotangents: Any = None
    ) -> "JacobianRegressor":
        """Fit the model to values and partials.

        The entries of a field share one scale, or one for each k of (N, K, H, W).

        Args:
            X: Inputs, (N, D).
            y: Values, (N,) or (N, K); or fields, (N, H, W), (N, K, H, W) or with more axes.
            jacobian: Partials ∂yₖ/∂xᵢ, (N, K, D), or (N, D) for one output; (N, *output, D) for fields; NaN if unknown.
                None: learn only values. With cotangents: projections uᵀ ∂y/∂x, (N, P, D).
            sample_weight: Weight of each sample, (N,).
            cotangents: Vectors u in output space, (N, P, *output), for example random signs. The memory for P
                projections of a sample is O(P (D + outputs)); its Jacobian is never formed.

        Raises:
            InputError: The samples or a parameter are invalid.
        """
        given = np.asarray(y)
        output = given.shape[1:] if given.ndim > 2 else None
        y = y if output is None else given.reshape(len(given), int(np.prod(output)))
        x, values = self._validated(X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        values = values.astype(np.float64)
        self._output: tuple[int, ...] = values.shape[1:] if output is None else output
        named = getattr(y, "columns", None)
        self._outputs = [getattr(y, "name", None) or "y"] if named is None else [str(name) for name in named]
        values = values.reshape(len(x), -1)
        self._check()
        j, u = self._derivatives(jacobian, cotangents, x)
        partials = j if u is None else None
        data, self.scaler_ = samples.standardize(
            x,
            values,
            j,
            sample_weight=sample_weight,
            output_weights=self.output_weights,
            partial_weights=self.partial_weights,
            jacobian_weight=self.jacobian_weight,
            y_scale=None if output is None else samples.shared_scale(values, output),
            cotangents=u,
        )
        self.warnings_: list[str] = []
        self._warn(samples.suspicious(x, values, partials, field=output is not None))
        self._box = x.min(0), x.max(0)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        seed = int(seed)
        weighted = any(each is not None for each in (sample_weight, self.output_weights, self.partial_weights))
        self.held_out_: dict[str, float] = {}
        self.process_: gaussian_process.GaussianProcess | None = None
        self.solver_ = self._solver(data, x, values, partials, weighted)
        if self.solver_[0] == "adam":
            self.model_ = "network"
            self.fits_ = [self._fit_minibatches(data, seed + 1000 * number) for number in range(self.ensemble)]
            self._calibration = 1.0
            return self
        self.model_ = self.model
        if self.model != "network" and not ((weighted or u is not None) and self.model == "auto"):
            self._fit_process(data, seed, weighted)
            if self.process_ is not None and not any(" in row " in line for line in self.warnings_):
                self._warn(gaussian_process.wrong_partials(self.process_))
        if self.model_ == "auto" and self.held_out_.get("gp", 1.0) < gaussian_process.EXACT:
            self.model_ = "gp"
        selections = self._select_networks(data, seed) if self.model_ != "gp" else []
        if self.model_ == "auto":
            held_out = selections[0].held_out
            of_process = self.held_out_.get("gp")
            if held_out is not None:
                self.held_out_["network"] = held_out
            better = of_process is not None and held_out is not None and of_process < held_out
            self.model_ = "gp" if better else "network"
        self.fits_ = [each.fit(data) for each in selections] if self.model_ == "network" else []
        self._calibration = self._calibrated(data, selections, seed) if self.fits_ else 1.0
        return self

    def _warn(self, lines: list[str]) -> None:
        self.warnings_ += lines
        for line in lines:
            warnings.warn(f"`fit` of `JacobianRegressor`: {line}", samples.DataWarning, stacklevel=3)

    def _solver(
        self, data: Standardized, x: Inputs, y: Values, j: samples.Jacobian | None, weighted: bool
    ) -> tuple[str, str]:
        """Return the solver and the reason for it."""
        if self.solver != "auto":
            return self.solver, "as set"
        if self.model == "gp" or weighted or data.u is not None:
            return "lbfgs", "a Gaussian process, weights or cotangents"
        if self.device != "cpu":
            return "adam", f"on {self.device}"
        if too_large(len(x), 0 if data.t is None else len(data.t), self._layout(data, self.activation)):
            return "adam", "too many samples for full-batch steps"
        if samples.is_noisy(x, y, j):
            return "adam", "noisy values"
        return "lbfgs", "deterministic, and small enough"

    def _layout(self, data: Standardized, activation: str) -> Perceptron:
        return layouts(data.x.shape[1], tuple(self.hidden), data.y.shape[1], activation)[0]

    def _fit_minibatches(self, data: Standardized, seed: int) -> Fit:
        """Return a network trained by Adam."""
        from jacmatch.surrogates.modules import fit_minibatches

        net = self._layout(data, self.activation)
        weight = 0.0 if data.t_weights is None else float(data.t_weights.sum()) / len(data.t_weights)
        theta = fit_minibatches(data, net, steps=self.steps, seed=seed, device=self.device, jacobian_weight=weight)
        return Fit(net, theta, 0.0, data.loss(net, theta), None, self.steps, [])

    def _fit_process(self, data: Standardized, seed: int, weighted: bool) -> None:
        """Fit a Gaussian process if it is requested and possible."""
        count, most = gaussian_process.conditions_on(data), gaussian_process.LARGEST
        if self.model == "gp" and (count > most or weighted):
            rule = f'`model="gp"` of `JacobianRegressor` takes up to {most} values and partials and no weights.'
            raise InputError(rule, got="weights" if weighted else f"{count}", do='Use model="network".')
        if self.model == "auto" and (count > most or data.split(seed) is None):
            return
        self.process_, loss = gaussian_process.select_process(data, seed, self.scaler_.zero)
        if loss is not None and self.model == "auto":
            self.held_out_["gp"] = loss

    def _select_networks(self, data: Standardized, seed: int) -> list[Selection]:
        """Return the networks of the ensemble, before their last fit."""
        before = getattr(self, "fits_", []) if self.warm_start else []
        nets = layouts(data.x.shape[1], tuple(self.hidden), data.y.shape[1], self.activation)
        before = before if len(before) == self.ensemble and all(fit.net in nets for fit in before) else []
        return [
            select_network(
                data,
                [before[number].net] if before else nets,
                starts=1 if before else self.starts,
                decays=DECAYS if self.weight_decay == "auto" else (float(self.weight_decay),),
                seed=seed if number == 0 else seed + 1000 * number,
                evaluations=self.max_evaluations,
                initial=before[number].theta if before else None,
                on_progress=self.on_progress,
            )
            for number in range(self.ensemble)
        ]

    def _calibrated(self, data: Standardized, selections: list[Selection], seed: int) -> Any:
        """Return the factor of the deviations or of 1 for which 90 % of the held-out samples lie in their interval."""
        ratios = []
        for number in range(len(selections)):
            parts = data.split(seed + 1000 * number)
            if parts is not None:
                y = np.stack([each.net(each.theta, parts[0].x, jacobian=False)[0] for each in selections])
                unit = np.maximum(y.std(0, ddof=1), 1e-12) if len(y) > 1 else 1.0
                ratios.append(np.abs(y[number] - parts[0].y) / unit)
        return np.quantile(np.concatenate(ratios), 0.9, axis=0) / gaussian_process.QUANTILE_95 if ratios else 1.0

    def distill(self, count: int = 600) -> "JacobianRegressor":
        """Return a network that learned values and partials of the Gaussian process in the box of the samples.

        It predicts without the samples, and much faster than the process.

        Args:
            count: Number of points at which the process is evaluated.

        Raises:
            InputError: There is no Gaussian process.
        """
        check_is_fitted(self)
        if self.process_ is None:
            rule = "`distill` of `JacobianRegressor` needs a Gaussian process."
            raise InputError(rule, got=f"model={self.model!r}", do='Use model="gp".')
        points = gaussian_process.spread(*self._box, count, 0)
        y, j, _ = self.process_(self.scaler_.inputs(points))
        assert j is not None
        values = self.scaler_.outputs(y).reshape(-1, *self._output)
        student: JacobianRegressor = clone(self).set_params(model="network")
        student.fit(points, values, jacobian=self.scaler_.jacobian(j).reshape(*values.shape, -1))
        student._outputs = self._outputs
        if hasattr(self, "feature_names_in_"):
            student.feature_names_in_ = self.feature_names_in_
        return student

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return values, (N,) or (N, K) as in `fit`; with `return_std` also standard deviations.

        Raises:
            InputError: `return_std` needs a Gaussian process or an ensemble.
        """
        y, std, _ = self._evaluate(X, jacobian=False, std=return_std)
        y = y.reshape(len(y), *self._output)
        return (y, std.reshape(y.shape)) if std is not None else y

    def predict_jacobian(self, X: Any) -> Float[ndarray, "sample *out input"]:
        """Return partials, (N, *output, D), or (N, D) if y of `fit` was (N,): D times the memory of the values.

        For inputs in float32 a network computes in float32: several times faster, and off by about 5e-7 of the largest
        partial.
        """
        *_, j = self._evaluate(X, jacobian=True, std=False)
        assert j is not None
        return np.asarray(j.reshape(len(j), *self._output, j.shape[2]))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R² of `predict`: the mean over outputs, or weighted by the variance of each entry of a field."""
        predicted, field = self.predict(X), len(self._output) > 1
        if field:
            y, predicted = (np.reshape(each, (len(predicted), -1)) for each in (y, predicted))
        average = "variance_weighted" if field else "uniform_average"
        return float(r2_score(y, predicted, sample_weight=sample_weight, multioutput=average))

    def predict_frame(self, X: Any, *, jacobian: bool = False, return_std: bool = False) -> Any:
        """Return predictions as a pandas frame with the index of X.

        Args:
            X: Inputs, a pandas frame.
            jacobian: Whether to add partials, in columns "dy/dx".
            return_std: Whether to add standard deviations, in columns "y_std".

        Raises:
            InputError: pandas is not installed, or there is no standard deviation.
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
        given = self._inputs(X)
        x = self.scaler_.inputs(given)
        if std and self.process_ is None and len(self.fits_) < 2:
            rule = "`predict(X, return_std=True)` of `JacobianRegressor` needs a Gaussian process or an ensemble."
            raise InputError(rule, got=f"model={self.model!r}, ensemble={len(self.fits_)}", do='Use model="gp".')
        spread = None
        if self.process_ is not None and ((std and len(self.fits_) < 2) or self.model_ == "gp"):
            y, j, spread = self.process_(x, jacobian=jacobian and self.model_ == "gp", std=std)
        if self.model_ == "network":
            x = x.astype(given.dtype, copy=False)
            members = [fit.net(fit.theta, x, jacobian=jacobian) for fit in self.fits_]
            y, j = members[0]
            if len(members) > 1:
                y = np.mean([each[0] for each in members], axis=0)
                j = np.mean([each[1] for each in members if each[1] is not None], axis=0) if jacobian else None
                spread = self._calibration * np.std([each[0] for each in members], axis=0, ddof=1) if std else None
            elif spread is not None:  # that of the process is too small for the network
                spread = np.hypot(spread, self._calibration)
        return (
            self.scaler_.outputs(y),
            None if spread is None else spread * self.scaler_.y_scale,
            None if j is None else self.scaler_.jacobian(j),
        )

    def _inputs(self, X: Any) -> Inputs:
        """Return checked inputs in float64, or in float32 if they are; scikit-learn's check is slow for few points."""
        plain = type(X) is np.ndarray and X.dtype in (np.float64, np.float32) and not hasattr(self, "feature_names_in_")
        if plain and X.ndim == 2 and X.shape[1] == self.n_features_in_ and len(X) and np.isfinite(X).all():
            return np.asarray(X)
        return np.asarray(self._validated(X, reset=False, dtype=[np.float64, np.float32]))

    def _validated(self, X: Any, *y: Any, **rules: Any) -> Any:
        """Call scikit-learn's check; where it fails, name the column or row."""
        try:
            if "category" in map(str, getattr(X, "dtypes", ())) or np.asarray(X).dtype.kind in "mM":
                raise ValueError("X must be numbers.")
            return validate_data(self, X, *y, **rules)
        except (TypeError, ValueError, OverflowError):
            for name, given in zip(("`X` of `JacobianRegressor`", "`y` of `JacobianRegressor`"), (X, *y), strict=False):
                check_columns(name, given)
            raise

    def _derivatives(
        self, jacobian: Any, cotangents: Any, x: Inputs
    ) -> tuple[Float[ndarray, "sample row input"] | None, Cotangents | None]:
        """Return checked partials, or projections and their cotangents."""
        if cotangents is None:
            shape = (len(x), *(self._output or (1,)), x.shape[1])
            pairs = [(k, i) for k in self._outputs for i in getattr(self, "feature_names_in_", ())]
            names = [f"d{k}/d{i}" for k, i in pairs]
            columns = list(getattr(jacobian, "columns", ()))
            other: dict[Any, str] = dict(zip(pairs, names, strict=True))
            if len(self._outputs) == 1:
                other |= {i: name for (_, i), name in zip(pairs, names, strict=True)}
            if columns and set(columns) <= set(other):  # pairs of names, or those of the inputs of a single output
                columns = [other[each] for each in columns]
                jacobian = jacobian.set_axis(columns, axis=1)
            unknown = [str(name) for name in columns if name not in names]
            if len(unknown) < len(columns):  # some are names of partials: by name, NaN where missing
                if unknown:
                    rule = "Each column of `jacobian` of `fit` must be dOUTPUT/dINPUT of columns of `y` and `X`."
                    raise InputError(rule, got=", ".join(unknown[:8]))
                jacobian = jacobian.reindex(columns=names)
            return (None if jacobian is None else samples.check_jacobian(jacobian, shape)), None
        u, rule = samples.check_cotangents(cotangents, len(x), self._output), "`cotangents` of `fit`"
        if jacobian is None:
            do = "Pass jacobian=G, with G[n, p] = uᵀ ∂y/∂x of sample n."
            raise InputError(f"{rule} need the projections, `jacobian` of shape (N, P, D).", got="jacobian=None", do=do)
        if self.model == "gp":
            raise InputError(f"{rule} cannot be used by a Gaussian process.", got='model="gp"', do='Use "network".')
        if self.solver == "adam" or self.device != "cpu":
            got = f'solver="{self.solver}", device="{self.device}"'
            raise InputError(f"{rule} need L-BFGS on the CPU.", got=got, do='Use solver="lbfgs" and device="cpu".')
        if self.output_weights is not None or self.partial_weights is not None:
            do = "Leave these weights out, or pass the Jacobian."
            raise InputError(f"{rule} cannot have weights of outputs or partials.", got="weights", do=do)
        return samples.check_jacobian(jacobian, (len(x), u.shape[1], x.shape[1]), "cotangents"), u

    def _check(self) -> None:
        """Refuse settings that are out of range."""
        if self.solver not in SOLVERS:
            raise unknown_name("`solver` of `JacobianRegressor`", self.solver, SOLVERS)
        if self.model not in MODELS:
            raise unknown_name("`model` of `JacobianRegressor`", self.model, MODELS)
        for name in ("starts", "ensemble", "steps", "max_evaluations"):
            if (name, given := getattr(self, name)) != ("max_evaluations", None):
                whole_number(f"`{name}` of `JacobianRegressor`", given)
        if np.ndim(self.hidden) != 1:
            rule = "`hidden` of `JacobianRegressor` must be the widths of hidden layers."
            raise InputError(rule, got=repr(self.hidden), do="One layer of 8 units is hidden=(8,).")
        for width in self.hidden:
            whole_number("Each width in `hidden` of `JacobianRegressor`", width)
        for name in ("weight_decay", "jacobian_weight"):
            given = getattr(self, name)
            if given != "auto" and (isinstance(given, str) or not 0 <= given < np.inf):
                rule = f'`{name}` of `JacobianRegressor` must be "auto" or a finite number of at least 0.'
                raise InputError(rule, got=repr(given))
