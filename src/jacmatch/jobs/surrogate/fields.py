"""The settings of the job `surrogate`, and checks that do not depend on the function."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jacmatch.errors import InputError
from jacmatch.jobs.settings import TrainingFields, flag, positive
from jacmatch.objectives import GradientShare
from jacmatch.surrogates.modules import Weight


@dataclass(frozen=True)
class SurrogateFields(TrainingFields):
    """Settings of a surrogate: the function, its points and derivatives, and the network."""

    teacher: str = "borehole"
    """Function to learn: PACKAGE.MODULE:CALLABLE, which maps a batch (N, D), a tensor or an array, to values (N, K);
    the examples borehole and ishigami; npz:FILE with x_train, y_train and optionally j_train (N, K, *input), u_train
    (cotangents of fields, whose projections are j_train), x_test, y_test, j_test, u_test; csv:FILE or parquet:FILE with
    columns x…, y… and dy/dx…. Without test points, a fifth of the points is held out."""
    x_columns: tuple[str, ...] = ()
    """Input columns of a csv or parquet file; by default those that begin with x."""
    y_columns: tuple[str, ...] = ()
    """Output columns of a csv or parquet file; by default those that begin with y."""
    jacobian: str = "auto"
    """Source of the partials: own (the attribute `jacobian` of the function), autograd, differences, or
    PACKAGE.MODULE:CALLABLE. auto: the first of these that is available."""
    step: float | None = None
    """Step of finite differences, as a fraction of the unit of an input. By default it depends on the precision of the
    function."""
    low: tuple[float, ...] = ()
    """Lower bound of each input, or one bound for all. By default the attribute `low` of the function."""
    high: tuple[float, ...] = ()
    """Upper bound of each input, or one bound for all. By default the attribute `high` of the function."""
    inputs: int | None = None
    """Number of inputs, if one bound is given for all."""
    sampling: Literal["box", "sobol", "latin-hypercube", "given", "active"] = "sobol"
    """Points at which the function is evaluated. box: independent and uniform; sobol: a scrambled Sobol sequence;
    latin-hypercube; given: the points of --points; active: where the error of the current network is largest."""
    points: Path | None = None
    """File of the points of --sampling given: an .npy file with an array (N, D)."""
    rounds: int = 3
    """Number of rounds of --sampling active."""
    samples: tuple[int, ...] = ()
    """Numbers of training points; one network is fitted for each. By default 32 64 128 256 for a function, and up to
    all points of a file."""
    test_samples: int = 1000
    """Number of held-out points, drawn uniformly in the box. With --points, a fifth of the points is held out."""
    methods: tuple[Literal["values", "slopes"], ...] = ("values", "slopes")
    """What is learned. values: only values; slopes: values and partials. The network of the last method with the most
    points is saved as that of the run."""
    slopes: Literal["jacobian", "jv", "rows"] = "jacobian"
    """Partials that are compared in a step of --solver adam. jacobian: all; jv: --probes random products; rows:
    --probes random rows."""
    probes: int = 1
    """Number of products or rows of --slopes jv or rows."""
    jacobian_weight: float | None = None
    """Weight of the term of the partials; the values have weight 1. Both are measured in --input-units and
    --output-units. By default both terms are equal for a constant network."""
    jacobian_share: float | None = None
    """Share of the term of the partials in the gradient norm, instead of a weight."""
    input_units: tuple[float, ...] = ()
    """Typical change of each input; by default the standard deviation of the points."""
    output_units: tuple[float, ...] = ()
    """Typical change of each output; by default the standard deviation of the training values."""
    model: Literal["auto", "network", "gp", "distilled"] = "auto"
    """network: fitted to the points. gp: a Gaussian process conditioned on values and partials. distilled: a network
    that also learns the values and partials of this process at additional points. auto: whichever is better on held-out
    points, and distilled instead of gp if almost no accuracy is lost; the report names the choice and the reason."""
    solver: Literal["auto", "lbfgs", "adam"] = "auto"
    """Solver that fits the network. lbfgs: in float64 over all points, with a weight decay selected on held-out points.
    adam: --steps minibatches. auto: lbfgs if possible, otherwise adam; the result names the reason."""
    hidden: tuple[int, ...] = (24, 24, 24)
    """Widths of the hidden layers."""
    activation: Literal["auto", "softplus", "silu", "tanh", "sine", "gelu", "relu"] = "auto"
    """Activation function; all except relu are smooth. auto: silu, or one layer of sines if its error on held-out
    points is smaller."""
    seeds: int = 3
    """Number of seeds. Points, initial weights and batches differ between seeds; they are the same for all methods of a
    seed."""
    onnx: Literal["auto", "always", "never"] = "auto"
    """Whether the network is also written as ONNX. auto: if the extra onnx is installed."""
    steps: int = 1000
    """Number of optimizer steps of --solver adam."""
    lr: float = 3e-3
    """Maximum learning rate of --solver adam."""
    validation: float = 0.0
    """Training points that are held out for the learning curves: a fraction (below 1) or a number."""

    def check(self) -> None:
        """Refuse settings that are wrong for any function."""
        positive("surrogate", probes=self.probes, seeds=self.seeds, rounds=self.rounds)
        if self.test_samples < 2:
            raise InputError("`--test-samples` of `surrogate` must be at least 2.", got=self.test_samples)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError("`--methods` of `surrogate` must name each method once.", got=" ".join(self.methods))
        if not 0 <= self.seed < 2**31:
            raise InputError("`--seed` of `surrogate` must be at least 0 and below 2³¹.", got=self.seed)
        if list(self.samples) != sorted(set(self.samples)) or any(count < 4 for count in self.samples):
            rule = "`--samples` of `surrogate` must be ascending numbers of at least 4."
            raise InputError(rule, got=" ".join(map(str, self.samples)))
        if (self.sampling == "given") != (self.points is not None):
            rule = "`--sampling given` and `--points FILE.npy` of `surrogate` must be given together."
            raise InputError(rule, got=f"--sampling {self.sampling}, --points {self.points}")
        if self.points is not None and (self.low or self.high or self.inputs):
            rule = "`--low`, `--high` and `--inputs` of `surrogate` must be left out with `--points`."
            raise InputError(rule, got=f"--points {self.points}", do="The points are where the function is evaluated.")
        if self.jacobian_weight is not None and self.jacobian_share is not None:
            raise InputError("`--jacobian-weight` and `--jacobian-share` of `surrogate` must not both be given.")
        for name in ("input_units", "output_units"):
            if not all(0 < unit < float("inf") for unit in getattr(self, name)):
                rule = f"`{flag(name)}` of `surrogate` must be positive and finite."
                raise InputError(rule, got=" ".join(map(str, getattr(self, name))))

    @property
    def weight(self) -> Weight:
        """The weight of the partials."""
        if self.jacobian_share is not None:
            return GradientShare(self.jacobian_share)
        return "scale" if self.jacobian_weight is None else self.jacobian_weight
