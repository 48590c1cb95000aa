"""`jacmatch surrogate`: a known or black-box function, with or without known slopes, becomes a network."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Data, Split, split_validation
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.inputs import matches
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.study import unfinished
from jacmatch.jobs.surrogate.asking import Asked, errors
from jacmatch.jobs.surrogate.exporting import difference, to_onnx
from jacmatch.jobs.surrogate.fields import SurrogateFields
from jacmatch.jobs.surrogate.fitting import fit_surrogate, new_student, regression
from jacmatch.jobs.surrogate.source import Source, output_units, source
from jacmatch.jobs.surrogate.tables import LABELS, figure, tables
from jacmatch.models import count_parameters
from jacmatch.objectives import Regression
from jacmatch.report import write_report
from jacmatch.runs import Run, spread, threads
from jacmatch.training import Fitted, fit
from jacmatch.version import __version__

_REPEATS = 5  # of a timing
_AT_ONCE = 256  # points of a timing


@dataclass(frozen=True)
class Surrogate(SurrogateFields):
    """Learn a function, known or a black box, by its values and slopes; with no options: flow through a borehole."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Asks, trains and measures, and returns the result that is written to the run folder."""
        self.check()
        start = time.perf_counter()
        asked = source(self)
        run = self.begin("surrogate")
        for part, here in asked.inputs.items():
            matches(run, part, here)
        seeds = range(self.seed, self.seed + (1 if self.smoke else self.seeds))
        test = asked.test(run)
        output_units(self, test.y)  # refused now, not after the training
        points: dict[int, dict[int, Asked]] = {}
        with progress or Progress() as shown:
            for seed in seeds:
                points[seed] = asked.training(run, seed, self._learner(asked, seed))
                for told in points[seed].values():
                    for method in self.methods:
                        done = self._one(run, asked, told, test, method, seed, shown)
                        if done is not None:
                            return unfinished(run, done.steps)
        result = self._result(run, asked, points, test, start)
        run.write_bytes("figure.svg", figure(result))
        report = write_report(run.path, result)
        run.write_result(result)
        return {**result, "out": str(run.path), "report": str(report)}

    def _learner(self, asked: Source, seed: int) -> Callable[[Asked], nn.Module]:
        """Trains a student on the points so far, for active sampling: half the steps."""

        def learn(told: Asked) -> nn.Module:
            x, y, j = _floats(told)
            return fit_surrogate(
                x,
                y,
                jacobian=j,
                slopes="none" if j is None else self.slopes,
                probes=self.probes,
                weight=self.weight,
                hidden=self.hidden,
                activation=self.activation,
                x_scale=asked.units.float(),
                y_scale=output_units(self, told.y).float(),
                steps=max(1, self.training().steps // 2),
                batch_size=self.batch_size,
                lr=self.lr,
                seed=seed,
                device=self.device,
            ).cpu()

        return learn

    def _one(
        self, run: Run, asked: Source, told: Asked, test: Asked, method: str, seed: int, progress: Progress
    ) -> Fitted | None:
        """One network: trained, or there already. A `Fitted` says that it is not finished yet."""
        child = run.child(**self._identity(run, seed, len(told), method))
        if child.finished:
            return None
        x, y, _ = _floats(told)
        train, held = self._parts(y, seed)
        torch.manual_seed(seed)
        student = new_student(x, y, self.hidden, self.activation, output_units(self, told.y).float())
        objective = self._objective(asked, told, train, student, method, seed)
        training = self.training()
        fitted = fit(
            objective,
            Split(x[train], y[train]),
            training,
            seed=seed,
            device=self.device,
            run=child,
            validation=Split(x[held], y[held]) if len(held) else None,
            on_step=progress.training(f"{LABELS[method]}, {len(told)} points, seed {seed}", training.steps),
        )
        if not fitted.finished:
            return fitted
        student.cpu().eval()
        networks.save(child, student, self._description(x, y))
        measured = errors(student, test, asked.units, output_units(self, test.y))
        child.write_result(
            {
                "job": "surrogate",
                "version": __version__,
                "threads": threads(),
                "seed": seed,
                "method": method,
                "samples": len(told),
                "teacher": None,
                "student": {"rmse": measured["rmse"], "parameters": count_parameters(student)},
                "agreement": _agreement(measured),
                "errors": measured,
                "seconds": fitted.seconds,
                "samples_per_second": fitted.samples_per_second,
                "peak_memory_bytes": fitted.peak_memory_bytes,
                "steps": fitted.steps,
                "settings": child.settings,
            }
        )
        return None

    def _identity(self, run: Run, seed: int, samples: int, method: str) -> dict[str, Any]:
        settings = {**run.settings, "seed": seed, "method": method, "size": samples}
        return {"name": f"seed{seed}/n{samples}/{method}", "settings": settings}

    def _description(self, x: Tensor, y: Tensor) -> networks.Description:
        """How the student is built again; what scales its outputs is in its weights."""
        layout = "-".join([*map(str, self.hidden), self.activation])
        shape = tuple(x.shape[1:])
        return networks.Description(f"scaled-mlp:{layout}", y.shape[1], shape, (0.0,) * shape[0], (1.0,) * shape[0])

    def _objective(
        self, asked: Source, told: Asked, train: Tensor, student: nn.Module, method: str, seed: int
    ) -> Regression:
        x, y, j = _floats(told)
        return regression(
            student,
            x[train],
            y[train],
            jacobian=None if j is None else j[train],
            slopes=self.slopes if method == "slopes" else "none",
            probes=self.probes,
            weight=self.weight,
            x_scale=asked.units.float(),
            y_scale=output_units(self, told.y).float(),
            seed=seed,
        )

    def _parts(self, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Rows for training, and those held out for the curves over the steps."""
        if not (0 <= self.validation < 1 or float(self.validation).is_integer()):
            raise InputError("`--validation` must be a share below 1 or a whole number.", got=self.validation)
        if not self.validation:
            return torch.arange(len(y)), torch.arange(0)
        return split_validation(y, self.validation if self.validation < 1 else int(self.validation), seed)

    def _result(
        self, run: Run, asked: Source, points: Mapping[int, Mapping[int, Asked]], test: Asked, start: float
    ) -> dict[str, Any]:
        """What is written to the run folder; the network that stands for the run is saved there."""
        curves = []
        for size in points[self.seed]:
            for method in self.methods:
                found = [run.child(**self._identity(run, seed, size, method)) for seed in points]
                curves.append(_curve(size, method, [each.result for each in found]))
        main = run.child(**self._identity(run, self.seed, max(points[self.seed]), self.methods[-1]))
        student = networks.load_student(main.path)
        networks.save(run, student, networks.describe(main.path))
        best, most = main.result, points[self.seed][max(points[self.seed])]
        result = {
            "job": "surrogate",
            "version": __version__,
            "threads": threads(),
            "about": f"a network that stands for {self.teacher}",
            "seed": self.seed,
            "teacher": None if asked.function is None else {"rmse": 0.0, "parameters": None},
            "student": best["student"],
            "agreement": best["agreement"],
            "samples_per_second": best["samples_per_second"],
            "peak_memory_bytes": best["peak_memory_bytes"],
            "methods": list(self.methods),
            "seeds": len(points),
            "curves": curves,
            "test_points": len(test),
            "function": None if asked.tried is None else asked.tried.plain(),
            "notes": _notes(asked),
            "export": self._export(run, student, test),
            "costs": {
                "trial_calls": 0 if asked.tried is None else asked.tried.calls,
                "training_calls": most.calls,
                "training_seconds": most.seconds,
                "test_calls": test.calls,
                "fit_seconds": best["seconds"],
                "speed": _speed(asked, student, test.x),
            },
            "seconds": time.perf_counter() - start,
            "settings": self.settings(),
        }
        result["tables"] = [table.plain() for table in tables(result)]
        return result

    def _export(self, run: Run, student: nn.Module, test: Asked) -> dict[str, Any]:
        """The files of the network, each compared with it."""
        x, t, file = test.x.float(), output_units(self, test.y), networks.WEIGHTS
        off = difference(networks.load_student(run.path), student, x, t, str(run.path / file))
        return {
            "safetensors": {"file": file, "largest_difference": off},
            "onnx": to_onnx(student, run.path, x, t, self.onnx),
        }


def _floats(told: Asked) -> tuple[Tensor, Tensor, Tensor | None]:
    return told.x.float(), told.y.float(), None if told.j is None else told.j.float()


def _agreement(measured: Mapping[str, float | None]) -> dict[str, float | None]:
    return {"top1": None, **{key: measured[key] for key in ("jacobian_cosine", "jacobian_relative_error")}}


def _curve(size: int, method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors of a method at a number of points: spreads over the seeds, None where they are not known."""
    found = {}
    for key in results[0]["errors"]:
        values = [result["errors"][key] for result in results]
        found[key] = None if None in values else spread(values)
    return {"samples": size, "method": method, "errors": found, "seconds": spread([r["seconds"] for r in results])}


def _notes(asked: Source) -> list[str]:
    """What a reader must know about the function."""
    function, tried = asked.function, asked.tried
    if function is None or tried is None:
        return _known_share(asked.data)
    bent = function.bent
    way = _WAYS[function.way]
    if function.way != "differences":
        way += _UNCHECKED if tried.disagreement is None else ", which agrees with differences"
    else:
        way += f", which ask it at {2 * asked.units.numel() + 1} more points for each"
    notes = [f"Slopes of the function: {way}."]
    if bent or tried.bent:
        where = f", for instance at x = {tried.place}" if tried.place else ""
        share = f"{bent} of {function.asked} points" if function.asked else f"{tried.bent:.0%} of the points tried"
        notes.append(
            f"The function is not smooth at the step of differences at {share}{where}: a jump, a kink or noise lies "
            "within it, and differences say little there. Try another --step."
        )
    return notes


def _known_share(data: Data | None) -> list[str]:
    """How much of the derivatives in a file is known, where not all are."""
    if data is None or data.train.jacobians is None:
        return []
    known = ~data.train.jacobians.isnan()
    if bool(known.all()):
        return []
    return [f"Derivatives are known at {int(known.sum()):,} of {known.numel():,} entries; the others are left out."]


_WAYS = {
    "own": "its own Jacobian",
    "autograd": "by autograd",
    "differences": "none known; antithetic differences of its values",
}
_UNCHECKED = ", which was not checked: the function is not smooth at the step of differences"


def _speed(asked: Source, student: nn.Module, x: Float[Tensor, "sample *input"]) -> dict[str, Any]:
    """Seconds a point of function and student on the CPU, medians; a batch, and one point alone."""
    function = None if asked.function is None else replace(asked.function)  # a copy: the counts stay
    found: dict[str, Any] = {}
    for name, some in (("batch", x[:_AT_ONCE]), ("single", x[:1])):
        mine = _median(student, some.float()) / len(some)
        theirs = None if function is None else _median(function.values, some) / len(some)
        ratio = None if theirs is None else theirs / mine
        found[name] = {"points": len(some), "teacher": theirs, "student": mine, "speed_up": ratio}
    return found


def _median(call: Callable[[Tensor], object], x: Tensor) -> float:
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            call(x)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
