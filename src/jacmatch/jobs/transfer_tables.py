"""The tables of a transfer: accuracy by method, how far the sets lie apart, and the bound term by term."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch.report.experiments import NOTHING, entry

_SETS = {"unseen": "unseen images of the target", "source": "images of the source"}
_ROOMS = {"pixels": "pixels", "features": "the teacher's pooled features"}
_TERMS = {
    "rho_unseen": "mean ρ, unseen",
    "rho_average": "mean ρ, training",
    "rho_largest": "max ρ, training",
    "slope": "K",
    "by_hausdorff": "max ρ + K·H",
    "by_nearest": "mean ρ + K·nearest",
    "by_transport": "mean ρ + K·W₁",
}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of `jacmatch transfer`."""
    rows = result["rows"]
    measures = (("top1", 100, 1), ("attention_cosine", 1, 2), ("jacobian_cosine", 1, 2))
    accuracy = [
        (row["label"], entry(row["accuracy"]), *(entry(row["agreement"][key], *form) for key, *form in measures))
        for row in rows
    ]
    teacher, settings = result["teacher"], result["settings"]
    notes = (
        f"{settings['data']}, {result['train_samples']} training images, {rows[0]['seeds']} seed(s). Agreement: share "
        "of unseen images on which the second head has the teacher's largest output; cosines: of attention maps, and "
        "of the slopes of their largest pixels.",
        f"The nearest class mean of the teacher's outputs has {100 * teacher['accuracy']:.1f} % accuracy.",
        f"Layers: {', '.join(' : '.join(pair) for pair in result['pairs']) or 'none'}.",
    )
    head = ("on the test part", "accuracy %", "agreement %", "cosine of maps", "cosine of slopes")
    bounds = {row["label"]: row["bound"] for row in rows if row["bound"] is not None}
    return [
        Table("accuracy", "Transfer", head, tuple(accuracy), notes),
        distance_table(result["distances"]),
        bound_table(bounds, settings["output_loss"]),
    ]


def distance_table(found: Mapping[str, Any], title: str = "How far from the training images") -> Table:
    """Hausdorff distance, mean nearest distance and W₁, by set and room."""
    rows = [
        (
            f"{_SETS[name]}, {_ROOMS[room]}",
            *(f"{each[key]:.3g}" for key in ("hausdorff", "mean_nearest", "wasserstein")),
        )
        for name, rooms in found.items()
        for room, each in rooms.items()
    ]
    head = ("from the training images", "Hausdorff", "mean nearest", "W₁")
    return Table("distances", title, head, tuple(rows), ("Euclidean, at most 300 images a set.",))


def bound_table(bounds: Mapping[str, Any], loss: str, title: str = "Why: the bound and its terms, in pixels") -> Table:
    """The terms of the bound by method, means over the seeds."""
    rows = [
        (label, *(NOTHING if bound is None else f"{bound[key]['mean']:.2f}" for key in _TERMS))
        for label, bound in bounds.items()
    ]
    what = "‖T(x) − S(x)‖ of the outputs" if loss == "squared" else "the divergence of the outputs"
    note = (
        f"ρ: {what}. K is estimated, the largest slope of ρ and ratio |ρ(x) − ρ(x′)| / ‖x − x′‖ seen on these images: "
        "a lower bound of the true constant. A right side far above the left says that the guarantee is empty, and "
        "which term makes it so."
    )
    return Table("bound", title, ("method", *_TERMS.values()), tuple(rows), (note,))
