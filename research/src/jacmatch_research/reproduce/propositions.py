"""Which statement about noise and Jacobians holds to which order in σ: the paper's, and the corrected ones."""

import math
from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING
from jacmatch_research.reproduce import noise_statements as say
from jacmatch_research.reproduce.expansion_figure import Expansion, expansion_figure
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.reproduce.noise_statements import (
    Statement,
    expansion_error,
    leading,
    limit,
    order_of,
    size_of_term,
)
from jacmatch_research.reproduce.shallow_pairs import AVERAGE, COLUMNS, INSIDE, ON_A_KINK, SMOOTH, location
from jacmatch_research.tables import Document, names, seeds_of

TEACHER, SOFT, LABELS = "teacher, squared error", "teacher, cross-entropy", "labels"
_PAPER, _ROOT = "paper", 1 / math.sqrt(2 * math.pi)
_SMEARED = -2 / 3 * _ROOT  # ∫ over the distance from a kink of the loss of squared derivatives by noise across it
_MEAN_SQUARE = (2 - math.sqrt(2)) / (3 * math.sqrt(math.pi))  # likewise of the squared mean, which a variance subtracts


def _of(name: str, family: str, printed: str, loss: say.Loss, term: Any, **more: Any) -> Statement:
    return Statement(name, family, printed, say.of_loss(loss), term, loss, **more)


STATEMENTS: dict[str, Statement] = {
    each.name: each
    for each in (
        _of("proposition 1", TEACHER, "σ⁴", say.squared_outputs, say.jacobian_distance),
        _of(
            "proposition 1, where S = T",
            TEACHER,
            "σ⁴",
            say.squared_outputs,
            say.jacobian_distance,
            agreeing=True,
            at_kinks=(_SMEARED, 1 / 4),
        ),
        Statement(
            "centered variance",
            TEACHER,
            "",
            say.variance,
            say.jacobian_distance,
            at_kinks=(_SMEARED - _MEAN_SQUARE, 1 / 4 - _ROOT**2),
            fourth=say.variance_fourth,
        ),
        Statement(
            "antithetic pair",
            TEACHER,
            "",
            say.antithetic,
            say.jacobian_distance,
            at_kinks=(2 * _SMEARED, 0.0),
            fourth=say.gradient_times_third,
        ),
        _of("equation 2", SOFT, "≈", say.soft_cross_entropy, say.equation_2),
        _of(
            "equation 2 + the lost square",
            SOFT,
            "",
            say.soft_cross_entropy,
            lambda at: say.equation_2(at) + say.lost_square(at),
        ),
        _of("equation 2, whole second order", SOFT, "", say.soft_cross_entropy, say.whole_soft_term),
        _of("KL, ½ Fisher", SOFT, "", say.kl, say.half_fisher),
        _of(
            "KL, ½ Fisher, where q = p",
            SOFT,
            "",
            say.kl,
            say.half_fisher,
            agreeing=True,
            at_kinks=(_SMEARED, 1 / 4),
            metric=say.half_variance,
        ),
        _of("proposition 2", LABELS, "σ⁴", say.squared_labels, say.label_norm),
        _of("equation 3", LABELS, "≈", say.label_cross_entropy, say.equation_3),
        _of("equation 3 with ½", LABELS, "", say.label_cross_entropy, lambda at: say.equation_3(at) / 2),
        _of("equation 3, whole second order", LABELS, "", say.label_cross_entropy, say.whole_label_term),
        _of("closed form", LABELS, "", say.label_cross_entropy, say.closed_form),
    )
}
"""The statements by name, in the order of the table."""

SIGMAS = tuple(0.1 / 2**step for step in range(5))
_ERROR = "remainder {:g}"


def _cells(request: Request) -> list[Cell]:
    columns = [column for column in COLUMNS if not request.smoke or column != AVERAGE]
    return [
        Cell(row, column, seed, {"sigmas": SIGMAS})
        for row in STATEMENTS
        for column in columns
        for seed in request.seed_numbers(3)
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Expansion errors and their order; order and coefficient of the leading one, measured and by theory.

    `order` and `expected` are None where theory says that the statement is exact; `error` is the quadrature's.
    """
    statement, sigmas = STATEMENTS[cell.row], cell.settings["sigmas"]
    results = [expansion_error(statement, location(cell.column, cell.seed, sigma), sigma) for sigma in sigmas]
    finest = location(cell.column, cell.seed, sigmas[-1])
    term, theory = size_of_term(statement, finest), leading(statement, finest)
    measured = None
    if theory.order is not None:
        measured = limit(sigmas, results, theory.order, theory.order + (2 if finest.kinks is None else 1))
    return {
        **{_ERROR.format(sigma): value for sigma, value in zip(sigmas, results, strict=True)},
        "slope": order_of(sigmas, results, term),
        "order": theory.order,
        "coefficient": measured,
        "expected": theory.coefficient if theory.order is not None else None,
        "term": term,
        "error": abs(expansion_error(statement, finest, sigmas[-1], fine=True) - results[-1]),
    }


def _tables(document: Document) -> list[Table]:
    columns, made = names(document, "column"), document["environment"]
    origin = (
        f"Networks with one hidden layer on the plane; pairs in each column: {seeds_of(document)}; "
        f"float64, torch {made['torch']}, jacmatch {made['jacmatch']}."
    )
    orders = Table(
        "propositions",
        "Order of the remainder in σ: measured slope of log |remainder| against log σ, mean over pairs",
        ("statement", "printed", *columns, "dropped ÷ remaining, smooth", "verdict"),
        tuple(_row(document, row, columns) for row in names(document, "row")),
        (
            "Orders are fitted to the three smallest σ; exact: the remainder is rounding at every σ. The Jacobian term "
            "has order 2, so a remainder of order 2 is not negligible; `dropped ÷ remaining` is its ratio to the term "
            "(median over pairs).",
            origin,
        ),
    )
    coefficients = Table(
        "coefficients",
        "Coefficient of the leading remainder, first pair: measured / by theory (order)",
        ("statement", *columns),
        tuple((row, *(_coefficient(document, row, column) for column in columns)) for row in names(document, "row")),
        (f"Largest deviation over all pairs: {100 * _deviation(document):.2g} %.", origin),
    )
    return [orders, coefficients]


def _row(document: Document, row: str, columns: list[str]) -> tuple[str, ...]:
    orders = [_order(document, row, column) for column in columns]
    return (row, STATEMENTS[row].printed or NOTHING, *orders, _dropped(document, row), _verdict(document, row))


def _order(document: Document, row: str, column: str) -> str:
    """The mean order of convergence as text."""
    results = _all(document, row, column)
    if not results:
        return NOTHING
    orders = [measures["slope"] for measures in results if measures["slope"] is not None]
    return f"{sum(orders) / len(orders):.2f}" if orders else "exact"


def _all(document: Document, row: str, column: str) -> list[Mapping[str, Any]]:
    return [cell["measures"] for cell in document["cells"] if (cell["row"], cell["column"]) == (row, column)]


def _dropped(document: Document, row: str) -> str:
    """The ratio of an expansion error of second order to the term, on smooth networks."""
    results = _all(document, row, SMOOTH)
    if not results or any(measures["order"] != 2 for measures in results):
        return NOTHING
    shares = sorted(abs(measures["coefficient"]) / measures["term"] for measures in results)
    return f"{100 * shares[len(shares) // 2]:.0f} %"


def _verdict(document: Document, row: str) -> str:
    """Return a summary of the orders on smooth networks and inside one linear region."""
    lowest = {}
    for column in (SMOOTH, INSIDE):
        orders = [math.inf if m["slope"] is None else m["slope"] for m in _all(document, row, column)]
        if not orders:
            return NOTHING
        lowest[column] = min(orders)
    if lowest[SMOOTH] > 3.5:
        return "holds"
    return "only inside a linear region" if lowest[INSIDE] > 3.5 else "does not hold"


def _coefficient(document: Document, row: str, column: str) -> str:
    results = _all(document, row, column)
    if not results:
        return NOTHING
    first = results[0]
    if first["order"] is None:
        return "exact"
    return f"{first['coefficient']:.4f} / {first['expected']:.4f} (σ{'⁰¹²³⁴'[first['order']]})"


def _deviation(document: Document) -> float:
    """The largest relative difference of a coefficient from theory."""
    results = [cell["measures"] for cell in document["cells"] if cell["measures"]["expected"] is not None]
    return max((abs(float(m["coefficient"]) / float(m["expected"]) - 1) for m in results), default=0.0)


def _figure(document: Document) -> bytes:
    """Remainders divided by their term's coefficient, geometric mean over pairs."""
    panels = []
    for family in (TEACHER, SOFT, LABELS):
        rows = [row for row in names(document, "row") if STATEMENTS[row].family == family]
        for column in (SMOOTH, INSIDE, AVERAGE, ON_A_KINK):
            lines = {row: _line(document, row, column) for row in rows if _all(document, row, column)}
            if lines:
                panels.append(Expansion(family, column, lines))
    return expansion_figure(panels)


def _line(document: Document, row: str, column: str) -> list[tuple[float, float]]:
    """Points (σ, |expansion error| ÷ term), none where the statement is exact."""
    results = [measures for measures in _all(document, row, column) if measures["slope"] is not None]
    points = []
    for sigma in SIGMAS if results else ():
        logs = [math.log(abs(m[_ERROR.format(sigma)]) / m["term"]) for m in results]
        points.append((sigma, math.exp(sum(logs) / len(logs))))
    return points


_ABOUT = "which statement about noise and Jacobians holds to which order: the paper's forms and the corrected ones"
PROPOSITIONS = Experiment(_ABOUT, _cells, _measure, _tables, _figure)
