"""`jacmatch transfer`: a pretrained teacher → a student of another architecture, on a small target set."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from jacmatch.datasets import Split
from jacmatch.jobs import networks
from jacmatch.jobs.closeness import distances, mixed, nearest_mean_accuracy
from jacmatch.jobs.inputs import same_inputs
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.summary import identity
from jacmatch.jobs.train import parts, unfinished
from jacmatch.jobs.transfer_tables import tables
from jacmatch.jobs.transferring import METHODS, Method, Ready, TransferFields
from jacmatch.models import FirstOutputs, count_parameters
from jacmatch.report import write_report
from jacmatch.runs import Run, spread, threads
from jacmatch.training import Fitted, evaluate
from jacmatch.version import __version__

_JUDGED = 2000  # test images that the teacher's own outputs are judged by


@dataclass(frozen=True)
class Transfer(TransferFields):
    """Transfer from a pretrained teacher to a student of another architecture, with few labelled images.

    Six rows at equal steps: labels; the teacher fine-tuned; labels and the teacher's outputs (learning without
    forgetting); the same with attention maps, with their Jacobians, with both.
    """

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Does the job, and returns the result that is written to the run folder."""
        self.check()
        start = time.perf_counter()
        with progress or Progress() as shown:
            ready = self.ready(shown)
            for method in self.methods:  # settings that cannot go together speak before anything is trained
                self.objective(method, ready.student(), ready)
            subset, _ = parts(ready.data, self.validation, self.per_class, self.seed)
            run = self.begin("transfer")
            same_inputs(run, ready.data, ready.teacher.network, (ready.description,))
            results: dict[str, list[dict[str, Any]]] = {method: [] for method in self.methods}
            for seed in range(self.seed, self.seed + (1 if self.smoke else self.seeds)):
                for method in self.methods:
                    done = self._one(run, method, seed, ready, shown)
                    if isinstance(done, Fitted):
                        return unfinished(run, done.steps)
                    results[method].append(done)
            if run.follows:
                return unfinished(run, self.training().steps)
            result = {
                **self._summary(run, results, ready, subset),
                "seconds": time.perf_counter() - start,
                "settings": self.settings(),
            }
        result["tables"] = [table.plain() for table in tables(result)]
        report = write_report(run.path, result)
        run.write_result(result)
        return {**result, "out": str(run.path), "report": str(report)}

    def _one(self, run: Run, method: Method, seed: int, ready: Ready, progress: Progress) -> dict[str, Any] | Fitted:
        """The result of one student: trained, or read from its folder. A `Fitted` says that it is not done yet."""
        child = run.child(f"seed{seed}/{method}", identity(run, seed, method))
        if child.finished:
            return child.result
        train, validation = parts(ready.data, self.validation, self.per_class, seed)
        on_step = progress.training(f"{METHODS[method]}, seed {seed}", self.training().steps)
        network, student, fitted = self.trained(
            method, seed, ready, train, run=child, validation=validation, on_step=on_step
        )
        if not fitted.finished or child.follows:
            return {} if fitted.finished else fitted
        if isinstance(student, FirstOutputs):
            kept = student.cut(
                ready.description.build(), train.inputs(torch.arange(2)).to(next(student.parameters()).device)
            )
            networks.save(child, kept, ready.description)
        result = {
            "job": "transfer",
            "version": __version__,
            "threads": threads(),
            "seed": seed,
            "method": method,
            "teacher": None,
            "student": {
                **evaluate(student, ready.data.test, device=self.device),
                "parameters": count_parameters(network),
            },
            **self.judged(method, network, ready, train),
            "seconds": fitted.seconds,
            "samples_per_second": fitted.samples_per_second,
            "peak_memory_bytes": fitted.peak_memory_bytes,
            "steps": fitted.steps,
            "compiled": fitted.compiled,
            "settings": child.settings,
        }
        child.write_result(result)
        return result

    def _summary(
        self, run: Run, results: dict[str, list[dict[str, Any]]], ready: Ready, subset: Split
    ) -> dict[str, Any]:
        """The result without seconds and tables; the last method but the oracle stands for the run."""
        rows = [_row(method, results[method]) for method in self.methods]
        main = next((method for method in reversed(self.methods) if method != "oracle"), self.methods[0])
        last = rows[self.methods.index(main)]
        first = results[main][0]
        teacher, test = ready.teacher, ready.data.test
        some = test.subset(torch.arange(min(_JUDGED, len(test))))
        if main != "oracle":
            network = networks.load_own(run.path / f"seed{self.seed}" / main, ready.description.spec)
            networks.save(run, network, ready.description)
        return {
            "job": "transfer",
            "version": __version__,
            "threads": threads(),
            "seed": self.seed,
            "teacher": {
                "accuracy": nearest_mean_accuracy(teacher.network, subset, some, ready.classes),
                "accuracy_of": "nearest class mean of its outputs",
                "parameters": count_parameters(teacher.network),
            },
            "student": {**first["student"], "accuracy": last["accuracy"]["mean"]},
            "agreement": {key: (value or {"mean": None})["mean"] for key, value in last["agreement"].items()},
            "samples_per_second": sum(result["samples_per_second"] for result in results[main]) / len(results[main]),
            "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results[main]),
            "rows": rows,
            "pairs": [list(pair) for pair in ready.pairs],
            "distances": self._distances(ready, subset),
            "train_samples": len(subset),
            "test_samples": len(test),
        }

    def _distances(self, ready: Ready, subset: Split) -> dict[str, Any]:
        """How far unseen images of the target, and those of the source where it is known, are from the training set."""
        teacher = ready.teacher
        near, far = self.images(ready, subset)
        layer = ready.pairs[-1][1] if ready.pairs else None
        found = {"unseen": distances(teacher.network, layer, near, far)}
        if teacher.source is not None:
            source = mixed(teacher.source.train, len(far)).inputs()
            found["source"] = distances(teacher.network, layer, near, source)
        return found


def _row(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One method: mean and standard deviation over the seeds."""

    def over_seeds(values: list[float | None]) -> dict[str, Any] | None:
        known = [value for value in values if value is not None]
        return spread(known) if known else None

    bounds = [result["bound"] for result in results if result["bound"] is not None]
    return {
        "method": method,
        "label": METHODS[method],
        "seeds": len(results),
        "steps": results[0]["steps"],
        "accuracy": spread([result["student"]["accuracy"] for result in results]),
        "agreement": {
            key: over_seeds([result["agreement"][key] for result in results]) for key in results[0]["agreement"]
        },
        "bound": {key: spread([each[key] for each in bounds]) for key in bounds[0]} if bounds else None,
        "seconds": spread([result["seconds"] for result in results]),
    }
