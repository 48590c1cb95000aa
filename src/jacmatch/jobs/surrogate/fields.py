"""The settings of the job `surrogate`, and what is wrong with them whatever the function."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jacmatch.errors import InputError
from jacmatch.jobs.settings import TrainingFields, positive
from jacmatch.objectives import GradientShare
from jacmatch.surrogates.modules import Weight


@dataclass(frozen=True)
class SurrogateFields(TrainingFields):
    """What a surrogate learns, from where, and how."""

    teacher: str = "borehole"
    """The function, PACKAGE.MODULE:CALLABLE: a batch (N, D) of tensors or arrays in, values (N, K) out; borehole or
    ishigami, examples; npz:FILE with x_train, y_train, perhaps j_train (N, K, *input), and x_test, y_test, j_test; or
    csv:FILE or parquet:FILE with columns x…, y… and dy/dx…. Without test points a fifth is held out."""
    x_columns: tuple[str, ...] = ()
    """Columns of the inputs in a csv or parquet file; those that begin with x if left out."""
    y_columns: tuple[str, ...] = ()
    """Columns of the outputs; those that begin with y if left out."""
    jacobian: str = "auto"
    """Partials of the function: own (its attribute `jacobian`), autograd, differences, or PACKAGE.MODULE:CALLABLE; auto
    takes the first of these that is there."""
    step: float | None = None
    """Step of differences as a share of the unit of an input; by the precision of the function if left out."""
    low: tuple[float, ...] = ()
    """Lower bound of each input, or one for all; the attribute `low` of the function if left out."""
    high: tuple[float, ...] = ()
    """Upper bounds."""
    inputs: int | None = None
    """Number of inputs, where one bound stands for all."""
    sampling: Literal["box", "sobol", "latin-hypercube", "given", "active"] = "sobol"
    """Where the function is evaluated: uniformly in the box, a Sobol sequence, a Latin hypercube, --points, or where
    student and function disagree."""
    points: Path | None = None
    """Given points: an .npy file with an array (N, D)."""
    rounds: int = 3
    """Rounds of --sampling active."""
    samples: tuple[int, ...] = ()
    """Training points, a network for each; 32 64 128 256 of a function, up to all of a file if left out."""
    test_samples: int = 1000
    """Held-out points, drawn uniformly in the box; of --points a fifth is held out."""
    methods: tuple[Literal["values", "slopes"], ...] = ("values", "slopes")
    """What is learned: values alone, values + partials. The last one, with most points, represents the run."""
    slopes: Literal["jacobian", "jv", "rows"] = "jacobian"
    """Which partials are compared in a step of --solver adam: all, --probes random products, or --probes
    random rows."""
    probes: int = 1
    """How many products or rows."""
    jacobian_weight: float | None = None
    """Weight of the partials beside values of weight 1, in units; if left out, both terms are equal for a constant."""
    jacobian_share: float | None = None
    """Their weight as a share of the gradient's norm instead."""
    input_units: tuple[float, ...] = ()
    """A typical change of each input; from the box or the points if left out."""
    output_units: tuple[float, ...] = ()
    """A typical change of each output; the standard deviation of the training values if left out."""
    model: Literal["auto", "network", "gp", "distilled"] = "auto"
    """What predicts: network, fitted to the points; gp, a Gaussian process that is conditioned on them; distilled, a
    network that also learns from this process at free points; auto takes network or distilled, by held-out points, and
    the result names the choice."""
    solver: Literal["auto", "lbfgs", "adam"] = "auto"
    """How the network is fitted: lbfgs, over all points in float64, with a weight decay selected on held-out points; or
    adam, in --steps minibatches. auto takes lbfgs wherever it applies, and the result names the reason if not."""
    hidden: tuple[int, ...] = (32, 32)
    """Widths of the hidden layers."""
    activation: Literal["softplus", "silu", "tanh", "gelu", "relu"] = "silu"
    """Activation; all but relu are smooth."""
    seeds: int = 3
    """How many seeds: points, initial weights and batches differ between them, and are the same for each method."""
    onnx: Literal["auto", "always", "never"] = "auto"
    """Whether the network is also written as ONNX; auto does it where the extra onnx is installed."""
    steps: int = 1000
    """Optimizer steps of --solver adam."""
    lr: float = 3e-3
    """Learning rate at its highest, of --solver adam."""
    validation: float = 0.0
    """Share (below 1) or number of training points held out for curves over the steps."""

    def check(self) -> None:
        """Refuses what is wrong whatever the function.

        Raises:
            InputError: settings are out of range or do not go together.
        """
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
            rule = "`--sampling given` and `--points FILE.npy` of `surrogate` must come together."
            raise InputError(rule, got=f"--sampling {self.sampling}, --points {self.points}")
        if self.points is not None and (self.low or self.high or self.inputs):
            rule = "`--low`, `--high` and `--inputs` of `surrogate` must be left out with `--points`."
            raise InputError(rule, got=f"--points {self.points}", do="The points are where the function is evaluated.")
        if self.jacobian_weight is not None and self.jacobian_share is not None:
            raise InputError("`--jacobian-weight` and `--jacobian-share` of `surrogate` must not both be given.")
        for name in ("input_units", "output_units"):
            if not all(0 < unit < float("inf") for unit in getattr(self, name)):
                rule = f"`--{name.replace('_', '-')}` of `surrogate` must be positive and finite."
                raise InputError(rule, got=" ".join(map(str, getattr(self, name))))

    @property
    def weight(self) -> Weight:
        """The weight of the partials."""
        if self.jacobian_share is not None:
            return GradientShare(self.jacobian_share)
        return "scale" if self.jacobian_weight is None else self.jacobian_weight
