"""Columns of a table over images per class."""

from collections.abc import Sequence

from jacmatch.errors import InputError
from jacmatch.jobs.data import parts
from jacmatch.report.figures import line_figure
from jacmatch_research.figures import by_columns
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.request import Request
from jacmatch_research.tables import Document, names, spreads


def per_class_of(request: Request, default: Sequence[int]) -> tuple[int, ...]:
    """Images per class, 0 for all: those that were requested, or of the default those that the data can fill.

    Raises:
        InputError: The data are no classes, or have not so many images of each.
    """
    data = students.data_of(request.data, request.seed, request.smoke)
    if data.classes is None:
        rule = f"`--data` of `reproduce {request.name}` must have classes."
        raise InputError(rule, got=f"a regression, {data.name}")
    pool, _ = parts(data, students.VALIDATION, 0, request.seed)
    least = int(pool.y.bincount().min())
    for number in request.per_class:
        if not 0 <= number <= least:
            rule = f"`--per-class` of `reproduce` must be 0 for all images, or at most {least} with these data."
            raise InputError(rule, got=number)
    if request.per_class:
        return tuple(dict.fromkeys(request.per_class))
    return tuple(number for number in default if number <= least)


def column_of(per_class: int) -> str:
    """The name of a column: images per class, or `all`."""
    return str(per_class) if per_class else "all"


def columns_figure(document: Document) -> bytes:
    """Test accuracy over images per class as an SVG file, a line for each row."""
    columns = sorted(names(document, "column"), key=lambda column: float("inf") if column == "all" else int(column))
    return line_figure(
        [(document["settings"]["data"], by_columns(spreads(document, "accuracy"), names(document, "row"), columns))],
        x_label="images per class",
        y_label="test accuracy in %",
        columns=columns,
    )
