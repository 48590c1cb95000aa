"""`jacmatch surrogate`: fit a network to a function, with or without known partials."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Split, split_validation
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.export import difference, require_onnx, to_onnx
from jacmatch.jobs.networks import matches
from jacmatch.jobs.study import NO_AGREEMENT, Cell, Done, Progress, Result, Task, run_cells, save_main
from jacmatch.jobs.surrogate.fields import SurrogateFields
from jacmatch.jobs.surrogate.points import Samples, errors
from jacmatch.jobs.surrogate.report import LABELS, Pictures, figure, tables
from jacmatch.jobs.surrogate.source import Arrays, Source, open_source
from jacmatch.models import count_parameters
from jacmatch.objectives import Regression
from jacmatch.report import Table
from jacmatch.report.page import FIGURE, PICTURES, SMALL_FIGURE, SMALL_PICTURES
from jacmatch.runs import Run, spread
from jacmatch.surrogates import gaussian_process as processes
from jacmatch.surrogates import solver as solvers
from jacmatch.surrogates.modules import new_student, regression, to_module, to_process_module
from jacmatch.surrogates.perceptron import ACTIVATIONS
from jacmatch.surrogates.samples import Scaler, is_noisy, standardize
from jacmatch.training import Fitted, find_device, fit
from jacmatch.training.loop import OnStep, peak_memory

_FAITHFUL = 0.1  # loss of a distilled network against its process, as a share of the held-out loss of the process
_REPEATS = 5  # of a timing
_AT_ONCE = 256  # points of a timing


@dataclass(frozen=True)
class Surrogate(SurrogateFields):
    """Fit a network to the values and partials of a function; by default, to the flow through a borehole."""

    main: ClassVar[str] = "teacher jacobian low high samples methods hidden seeds out smoke"
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher simulator:pressure --low 0 0 --high 1 2",
        "--teacher npz:measured.npz --out runs/fit",
    )

    def run(self, progress: Progress | None = None) -> Result:
        """Query, train and measure, and return the result that is written to the run folder."""
        self.check()
        if self.onnx == "always":
            require_onnx()
        with progress or Progress() as shown:
            source = open_source(self)
            run = self.begin("surrogate")
            for part, here in source.inputs.items():
                matches(run, part, here)
            test = source.test(run)
            source.output_units(test.y)  # refuses wrong units before anything is trained
            points: dict[int, dict[int, Samples]] = {}
            return run_cells(
                run,
                self._cells(run, source, points),
                partial(self._prepare, source, points, test),
                partial(self._conclude, run, source, points, test),
                device=self.device,
                progress=shown,
                tables=partial(self._tables, run, source, test),
            )

    def _cells(self, run: Run, source: Source, points: dict[int, dict[int, Samples]]) -> Iterator[Cell]:
        """Yield the cells, seed by seed; the training points of a seed are added to `points` before its first cell."""
        for seed in range(self.seed, self.seed + (1 if self.smoke else self.seeds)):
            points[seed] = source.training(run, seed, self._learner(source, seed))
            for size, samples in points[seed].items():
                for method in self._learned(source):
                    yield Cell(
                        seed=seed,
                        method=method,
                        label=f"{LABELS[method]}, {size} points",
                        training=self.training(),
                        network=self._description(source, samples, method),
                        settings={"size": size},
                        size=f"n{size}",
                        others=self._others(source, samples, method),
                    )

    def _others(self, source: Source, samples: Samples, method: str) -> tuple[str, ...]:
        """Layouts that `--activation auto` and `--model auto` may select instead of the first."""
        nets = solvers.layouts(1, self.hidden, 1, self.activation)[1:]
        process = (self._process_layout(source, samples, method),) if self.model == "auto" and samples.u is None else ()
        return (*(_layout(net.widths[1:-1], net.activation) for net in nets), *process)

    @property
    def _first_activation(self) -> str:
        return "silu" if self.activation == "auto" else self.activation

    def _learned(self, source: Source) -> tuple[str, ...]:
        """Methods to train; only values if no partials are known."""
        return self.methods if source.has_partials else ("values",)

    def _learner(self, source: Source, seed: int) -> Callable[[Samples], nn.Module]:
        """Train a student on the points so far, for active sampling: half the steps."""

        def learn(samples: Samples) -> nn.Module:
            x, y, j = _floats(samples)
            if self.solver_for(samples)[0] == "lbfgs":
                return self.network_of(source, samples, "values" if j is None else "slopes", seed)[0]
            torch.manual_seed(seed)
            student = new_student(x, y, self.hidden, self._first_activation, source.output_units(samples.y).float())
            objective = self._objective(
                source, samples, torch.arange(len(x)), student, "values" if j is None else "slopes", seed
            )
            training = replace(self.training(), steps=max(1, self.training().steps // 2))
            fit(objective, Split(x, y), training, seed=seed, device=self.device)
            return student.cpu().eval()

        return learn

    def _prepare(self, source: Source, points: Mapping[int, Mapping[int, Samples]], test: Samples, cell: Cell) -> Task:
        samples = points[cell.seed][cell.settings["size"]]
        x, y, _ = _floats(samples)
        train, validated = self._parts(y, cell.seed)
        torch.manual_seed(cell.seed)
        student = new_student(x, y, self.hidden, self._first_activation, source.output_units(samples.y).float())
        if self.model == "gp":
            self._check_process(self.standardized(source, samples, cell.method)[0])
            student = self._description(source, samples, cell.method).build()
        solver, reason = self.solver_for(samples)
        objective: nn.Module = student
        solve: Callable[[OnStep], Fitted] | None = None
        solution: dict[str, Any] = {"name": solver, "reason": reason}
        if self.model == "gp":
            solve = partial(self._condition, source, samples, cell, student, solution)
        elif solver == "lbfgs":
            solve = partial(self._solve, source, samples, cell, solution)
        else:
            objective = self._objective(source, samples, train, student, cell.method, cell.seed)

        def finish() -> tuple[nn.Module, dict[str, Any]]:
            network = solution.pop("module", student).cpu().eval()
            measured = errors(network, test, source.units, source.output_units(test.y))
            process, scaler = solution.pop("process", None), solution.pop("scaler", None)
            if process is not None:
                mean, _, std = process(scaler.inputs(test.x.flatten(1).numpy()), jacobian=False, std=True)
                off = np.abs(scaler.outputs(mean) - test.y.numpy())
                solution["coverage_90"] = float((off <= processes.QUANTILE_95 * std * scaler.y_scale).mean())
            return network, {
                "spec": solution.pop("spec", None),
                "samples": len(samples),
                "teacher": None,
                "student": {"rmse": measured["rmse"], "parameters": count_parameters(network)},
                "agreement": {key: measured.get(key) for key in NO_AGREEMENT},
                "errors": measured,
                "solver": solution,
            }

        validation = Split(x[validated], y[validated]) if len(validated) else None
        return Task(objective, Split(x[train], y[train]), validation, finish, solve)

    def solver_for(self, samples: Samples) -> tuple[str, str]:
        """Return the solver, and why it was selected.

        Raises:
            InputError: `--solver lbfgs` is set together with something that only the training loop has.
        """
        tangents = 0 if samples.j is None else samples.x[0].numel()
        if samples.u is not None and self.model in ("gp", "distilled"):
            rule = "Cotangents, `u_train` of a file, cannot be used by a Gaussian process."
            raise InputError(rule, got=f"--model {self.model}", do="Use --model network, or leave it out.")
        needs = {
            f"--activation {self.activation}": self.activation not in (*ACTIVATIONS, "auto"),
            f"--slopes {self.slopes}": self.slopes != "jacobian",
            "--jacobian-share": self.jacobian_share is not None,
            "--validation": bool(self.validation),
            "--max-steps": self.max_steps is not None,
            "--devices": self.devices > 1 or self.shard,
            f"--device {self.device}": find_device(self.device).type != "cpu",
        }
        reason = next((f"{name} needs the training loop" for name, needed in needs.items() if needed), None)
        if self.model == "gp":
            if reason or self.solver != "auto":
                rule = "`--model gp` of `surrogate` takes no options of a network or its solver."
                raise InputError(rule, got=reason or f"--solver {self.solver}", do="Leave it out.")
            return "gp", "as set"
        if samples.u is not None and (reason or self.solver == "adam"):
            rule = "Cotangents, `u_train` of a file, need L-BFGS on the CPU."
            raise InputError(rule, got=reason or "--solver adam", do="Leave it out.")
        if self.solver == "lbfgs" and reason is not None:
            rule = "`--solver lbfgs` of `surrogate` fits on the CPU with all points and partials in each evaluation."
            raise InputError(rule, got=reason, do="Leave it out, or use --solver adam.")
        if self.solver != "auto":
            return self.solver, "as set"
        if reason is None:
            net = solvers.layouts(samples.x[0].numel(), self.hidden, samples.y.shape[1], self.activation)[0]
            if solvers.too_large(len(samples), tangents, net):
                reason = "too many points for full-batch steps"
            elif samples.j is not None and samples.u is None:
                noisy = is_noisy(samples.x.flatten(1).numpy(), samples.y.numpy(), samples.j.flatten(2).numpy())
                reason = "noisy values" if noisy else None
        return ("adam", reason) if reason and samples.u is None else ("lbfgs", "deterministic, and small enough")

    def _check_process(self, data: solvers.Standardized) -> None:
        """Refuse more values and partials than a Gaussian process can be conditioned on."""
        count = processes.conditions_on(data)
        if count > processes.LARGEST:
            rule = f"`--model gp` of `surrogate` takes up to {processes.LARGEST} values and partials of an output."
            raise InputError(rule, got=count, do="Use --model network, or fewer --samples.")

    def _solve(self, source: Source, samples: Samples, cell: Cell, solution: dict[str, Any], on_step: OnStep) -> Fitted:
        """Fit the network of a cell with the second-order solver."""
        start = time.perf_counter()

        def on_progress(done: int, planned: int, loss: float) -> None:
            on_step(cell.training.steps * done // planned, {})

        module, fitted, free = self.network_of(source, samples, cell.method, cell.seed, on_progress)
        spec = _layout(fitted.net.widths[1:-1], fitted.net.activation)
        spec = self._process_layout(source, samples, cell.method) if free["model"] == "gp" else spec
        solution |= {"module": module, "spec": spec}
        solution |= {"weight_decay": fitted.decay, "held_out_loss": fitted.held_out, "loss": fitted.loss, **free}
        seconds = time.perf_counter() - start
        steps = fitted.evaluations
        return Fitted(steps, seconds, len(samples) * steps / seconds, peak_memory(torch.device("cpu")), finished=True)

    def standardized(self, source: Source, samples: Samples, method: str) -> tuple[solvers.Standardized, Scaler]:
        """Return values and, if the method has them, partials in units, and the scaler."""
        partials = None if samples.j is None or method == "values" else samples.j.flatten(2).numpy()
        return standardize(
            samples.x.flatten(1).numpy(),
            samples.y.numpy(),
            partials,
            jacobian_weight="auto" if self.jacobian_weight is None else self.jacobian_weight,
            x_scale=source.units.flatten().numpy(),
            y_scale=source.output_units(samples.y).numpy(),
            cotangents=None if samples.u is None or partials is None else samples.u.numpy(),
        )

    def _condition(
        self, source: Source, samples: Samples, cell: Cell, student: nn.Module, solution: dict[str, Any], _: OnStep
    ) -> Fitted:
        """Condition the Gaussian process of a cell."""
        start = time.perf_counter()
        data, scaler = self.standardized(source, samples, cell.method)
        process = processes.select_process(data, cell.seed, scaler.zero)[0]
        student.load_state_dict(to_process_module(process, scaler, tuple(samples.x.shape[1:])).state_dict())
        solution |= {"process": process, "scaler": scaler}
        seconds = time.perf_counter() - start
        return Fitted(1, seconds, len(samples) / seconds, peak_memory(torch.device("cpu")), finished=True)

    def network_of(
        self, source: Source, samples: Samples, method: str, seed: int, on_progress: solvers.OnProgress | None = None
    ) -> tuple[nn.Module, solvers.Fit, dict[str, Any]]:
        """Return the model of all points, the fit of its network, and how it was selected.

        "auto" takes the Gaussian process itself where a network distilled from it would lose accuracy.
        """
        shape = tuple(samples.x.shape[1:])
        data, scaler = self.standardized(source, samples, method)
        nets = solvers.layouts(data.x.shape[1], self.hidden, data.y.shape[1], self.activation)
        free: dict[str, Any] = {"model": "network", "gp_held_out_loss": None, "free_points": 0, "distilled_loss": None}
        tried = self.model != "network" and data.u is None and processes.conditions_on(data) <= processes.LARGEST
        process, of_process = processes.select_process(data, seed, scaler.zero) if tried else (None, None)
        free["gp_held_out_loss"] = of_process
        as_process = {"model": "gp", "process": process, "scaler": scaler}
        if self.model == "auto" and process is not None and of_process is not None and of_process < processes.EXACT:
            exact = solvers.Fit(nets[0], nets[0].initial(seed), 0.0, of_process, None, 1)  # no network is tried
            return to_process_module(process, scaler, shape), exact, free | as_process
        how: dict[str, Any] = {"evaluations": self.training().steps if self.smoke else None, "on_progress": on_progress}
        decays = (self.weight_decay,) if self.weight_decay else solvers.DECAYS
        selection = solvers.select_network(data, nets, starts=1, decays=decays, seed=seed, **how)
        better = of_process is not None and selection.held_out is not None and of_process < selection.held_out
        if process is None or not (better or self.model == "distilled"):
            fitted = selection.fit(data)
            return to_module(fitted.net, fitted.theta, scaler, shape), fitted, free
        whole = processes.with_free_samples(data, process, seed)
        most = 2 * solvers.planned_evaluations(whole, selection.net)
        fitted = replace(selection, last=min(selection.last, most)).fit(whole)
        lost = processes.distilled_loss(data, process, fitted, seed + 1)
        free |= {"model": "distilled", "free_points": len(whole) - len(data), "distilled_loss": lost}
        if self.model == "auto" and of_process is not None and lost > _FAITHFUL * of_process:
            return to_process_module(process, scaler, shape), fitted, free | as_process
        return to_module(fitted.net, fitted.theta, scaler, shape), fitted, free

    def _description(self, source: Source, samples: Samples, method: str) -> networks.Description:
        """Return the description of the student; its weights contain the scaling of the outputs."""
        gp = self.model == "gp"
        layout = self._process_layout(source, samples, method) if gp else _layout(self.hidden, self._first_activation)
        shape = tuple(samples.x.shape[1:])
        mean, std = (0.0,) * shape[0], (1.0,) * shape[0]
        return networks.Description(layout, samples.y.shape[1], shape, mean, std)

    def _process_layout(self, source: Source, samples: Samples, method: str) -> str:
        """Return the catalogue name of the Gaussian process."""
        groups = processes.patterns(self.standardized(source, samples, method)[0])
        return f"gaussian-process:{len(samples)}-{len(groups)}"

    def _objective(
        self, source: Source, samples: Samples, train: Tensor, student: nn.Module, method: str, seed: int
    ) -> Regression:
        x, y, j = _floats(samples)
        return regression(
            student,
            x[train],
            y[train],
            jacobian=None if j is None else j[train],
            partials=self.slopes if method == "slopes" else "none",
            probes=self.probes,
            weight=self.weight,
            x_scale=source.units.float(),
            y_scale=source.output_units(samples.y).float(),
            seed=seed,
        )

    def _parts(self, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rows for training, and those held out for the learning curves."""
        if not (0 <= self.validation < 1 or float(self.validation).is_integer()):
            raise InputError("`--validation` must be a fraction below 1, or an integer.", got=self.validation)
        if not self.validation:
            return torch.arange(len(y)), torch.arange(0)
        return split_validation(y, self.validation if self.validation < 1 else int(self.validation), seed)

    def _conclude(
        self, run: Run, source: Source, points: Mapping[int, Mapping[int, Samples]], test: Samples, done: Done
    ) -> Result:
        """The result; the last method with most points represents the run."""
        methods = self._learned(source)
        measured: dict[tuple[int, str], list[Result]] = {}
        for cell, each in done:
            measured.setdefault((cell.settings["size"], cell.method), []).append(each)
        curves = [_curve(size, method, each) for (size, method), each in measured.items()]
        most = points[self.seed][max(points[self.seed])]
        main, best = next(
            (cell, result) for cell, result in reversed(done) if cell.seed == self.seed and cell.method == methods[-1]
        )
        student = save_main(run, main)
        return {
            "about": f"a network that replaces {self.teacher}",
            "teacher": None if source.function is None else {"rmse": 0.0, "parameters": None},
            "student": best["student"],
            "agreement": best["agreement"],
            "samples_per_second": best["samples_per_second"],
            "peak_memory_bytes": best["peak_memory_bytes"],
            "methods": list(methods),
            "seeds": len(points),
            "solver": best["solver"],
            "curves": curves,
            "test_points": len(test),
            **({} if source.file is None or source.file.output is None else {"output_shape": source.file.output}),
            "function": None if source.check is None else source.check.plain(),
            "notes": [*_notes(source), *_selected(best["solver"])],
            "export": self._export(run, source, student, test),
            "costs": {
                "trial_calls": 0 if source.check is None else source.check.calls,
                "training_calls": most.calls,
                "training_seconds": most.seconds,
                "test_calls": test.calls,
                "fit_seconds": best["seconds"],
                "speed": _speed(source, student, test.x),
            },
        }

    def _tables(self, run: Run, source: Source, test: Samples, result: Result) -> list[Table]:
        """Draw the figure and, at the held-out points and along slices, the network; calls for these are counted."""
        run.write_bytes(FIGURE, figure(result))
        run.write_bytes(SMALL_FIGURE, figure(result, small=True))
        if self.smoke:
            return tables(result)
        before = 0 if source.function is None else source.function.points
        shown = Pictures(networks.load_student(run.path), test, source.region, source.function)
        result["costs"]["slice_calls"] = 0 if source.function is None else source.function.points - before
        run.write_bytes(PICTURES, shown.draw())
        run.write_bytes(SMALL_PICTURES, shown.draw(small=True))
        return [*tables(result), shown.table()]

    def _export(self, run: Run, source: Source, student: nn.Module, test: Samples) -> dict[str, Any]:
        """Write the files of the network, and compare each with it."""
        x, t, file = test.x.float(), source.output_units(test.y), networks.WEIGHTS
        off = difference(networks.load_student(run.path), student, x, t, str(run.path / file))
        return {
            "safetensors": {"file": file, "largest_difference": off},
            "onnx": to_onnx(student, run.path, x, t, self.onnx),
        }


def _layout(hidden: Sequence[int], activation: str) -> str:
    """The catalogue name of a network."""
    return f"scaled-mlp:{'-'.join([*map(str, hidden), activation])}"


def _floats(samples: Samples) -> tuple[Tensor, Tensor, Tensor | None]:
    return samples.x.float(), samples.y.float(), None if samples.j is None else samples.j.float()


def _curve(size: int, method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors of a method at a number of points: spreads over the seeds, None where they are not known."""
    measured = {}
    for key in results[0]["errors"]:
        values = [result["errors"][key] for result in results]
        measured[key] = None if None in values else spread(values)
    return {"samples": size, "method": method, "errors": measured, "seconds": spread([r["seconds"] for r in results])}


def _notes(source: Source) -> list[str]:
    """Return notes about the function, for the report."""
    function, check = source.function, source.check
    if source.file is not None:
        return [*_known_share(source.file), *(f"Samples: {line}" for line in source.file.warnings)]
    if function is None or check is None:
        return []
    way = {"own": "its own Jacobian", "autograd": "by autograd"}.get(function.way)
    if way is None:
        way = "none known; antithetic differences of its values, which evaluate it at "
        way += f"{2 * source.units.numel() + 1} more points for each"
    elif check.disagreement is None:
        way += ", which was not checked: the function is not smooth at the step of differences"
    else:
        way += ", which agrees with differences"
    notes = [f"Partials of the function: {way}."]
    if function.non_smooth or check.non_smooth:
        where = f", for instance at x = {check.point}" if check.point else ""
        share = f"{function.non_smooth} of {function.differenced} points"
        share = share if function.differenced else f"{check.non_smooth:.0%} of the points checked"
        notes.append(
            f"The function is not smooth at the step of differences at {share}{where}: a jump, a kink or noise lies "
            "within it, and differences are unreliable there. Try another --step."
        )
    return notes


def _selected(solver: Mapping[str, Any]) -> list[str]:
    """Return a note about the losses by which `--model auto` selected."""
    if solver.get("gp_held_out_loss") is None:
        return []
    keys = {"held_out_loss": "network", "gp_held_out_loss": "gp", "distilled_loss": "distilled, against gp"}
    losses = [f"{name} {loss:.2g}" for key, name in keys.items() if (loss := solver.get(key)) is not None]
    return [f"Selected model: {solver['model']}. Held-out losses: {'; '.join(losses)}."]


def _known_share(file: Arrays) -> list[str]:
    """Return a note about the share of known derivatives in a file, if some are unknown."""
    if file.train.j is None:
        return ["No partials are known: only values were learned."]
    known = ~file.train.j.isnan()
    if bool(known.all()):
        return []
    return [f"Derivatives are known at {int(known.sum()):,} of {known.numel():,} entries; the others are left out."]


def _speed(source: Source, student: nn.Module, x: Float[Tensor, "sample *input"]) -> dict[str, Any]:
    """Seconds a point of function and student on the CPU, medians; a batch, and one point alone."""
    function = None if source.function is None else replace(source.function)  # a copy: the counts stay
    measured: dict[str, Any] = {}
    for name, some in (("batch", x[:_AT_ONCE]), ("single", x[:1])):
        mine = _median(student, some.float()) / len(some)
        theirs = None if function is None else _median(function.values, some) / len(some)
        ratio = None if theirs is None else theirs / mine
        measured[name] = {"points": len(some), "teacher": theirs, "student": mine, "speed_up": ratio}
    return measured


def _median(call: Callable[[Tensor], object], x: Tensor) -> float:
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            call(x)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
