"""Tables and figures of experiments: hand-made documents, and numbers worked out by hand."""

import xml.etree.ElementTree as ET

import pytest

from jacmatch.report.figures import PALETTE
from jacmatch_research import tables as made
from jacmatch_research.figures import Line, by_columns, dot_figure, line_figure


def cell(row, column, seed, **measures):
    return {"row": row, "column": column, "seed": seed, "measures": measures, "seconds": 1.0}


DOCUMENT = {
    "experiment": "none",
    "size": "cpu",
    "settings": {"data": "digits"},
    "environment": {"cuda": None, "platform": "Linux-6-x86", "torch": "2.13.0", "jacmatch": "0.1.0"},
    "facts": {},
    "cells": [
        cell("a", "1", 1, accuracy=0.7, top1=0.5, calibration_error=0.02),
        cell("a", "1", 0, accuracy=0.5, top1=0.5, calibration_error=0.04),
        cell("b", "1", 0, accuracy=0.6, top1=None, calibration_error=0.04),
        cell("b", "1", 1, accuracy=0.9, top1=None, calibration_error=0.04),
        cell("a", "10", 0, accuracy=0.8, top1=1.0, calibration_error=0.1),
    ],
}


def test_spreads_are_in_the_order_of_the_seeds():
    result = made.spreads(DOCUMENT, "accuracy")
    mean_and_std = {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5)}
    assert result["a", "1"] == {**mean_and_std, "values": [0.5, 0.7], "seeds": [0, 1]}
    assert result["a", "10"]["std"] is None
    assert ("b", "1") not in made.spreads(DOCUMENT, "top1")


def test_a_grid_has_a_dash_where_nothing_was_measured():
    assert made.grid(DOCUMENT, "accuracy") == [("a", "60.0 ± 14.1", "80.0"), ("b", "75.0 ± 21.2", "–")]
    assert made.grid(DOCUMENT, "accuracy", rows=["b"], columns=["1"], scale=1, digits=2) == [("b", "0.75 ± 0.21")]


def test_gains_are_taken_seed_by_seed():
    """0.6 − 0.5 and 0.9 − 0.7: mean 0.15, standard deviation √(2 · 0.05²)."""
    assert made.gains(DOCUMENT, "b", "a") == ("gain: b − a", "+15.0 ± 7.1", "–")
    assert made.gains(DOCUMENT, "a", "b")[1] == "-15.0 ± 7.1"


def test_a_difference_is_of_the_seeds_of_the_first_and_none_where_the_second_lacks_one():
    result = made.spreads(DOCUMENT, "accuracy")
    assert made.paired(result["a", "1"], result["a", "10"]) is None
    assert made.paired(result["a", "10"], result["a", "1"])["values"] == [pytest.approx(0.8 - 0.5)]


def test_as_many_seeds_are_not_the_same_seeds():
    """Seeds 0 and 2 against 0 and 1 have no difference; the order of the cells does not matter."""
    cells = [cell("a", "1", 0, x=0.1), cell("a", "1", 2, x=0.2), cell("b", "1", 0, x=0.4), cell("b", "1", 1, x=0.5)]
    document = {**DOCUMENT, "cells": cells}
    assert made.gains(document, "b", "a", "x") == ("gain: b − a", "–")
    document["cells"] = [*cells[::-1], cell("a", "1", 1, x=0.3), cell("b", "1", 2, x=0.9)]
    result = made.spreads(document, "x")
    assert made.paired(result["b", "1"], result["a", "1"]) == {
        "mean": pytest.approx(0.4),
        "std": pytest.approx((0.14 / 2) ** 0.5),
        "values": pytest.approx([0.3, 0.2, 0.7]),
        "seeds": [0, 1, 2],
    }


def test_the_origin_lists_what_the_cells_were_made_with():
    """A cell that does not say it is one of the machine of the whole document."""
    gpu = {"cuda": "NVIDIA H100", "platform": "Linux-6-x86", "torch": "2.14.0", "jacmatch": "0.1.0"}
    document = {**DOCUMENT, "cells": [DOCUMENT["cells"][0], {**DOCUMENT["cells"][1], "made": gpu}]}
    assert made.origin(document).endswith(
        "CPU, one thread (Linux) and NVIDIA H100, torch 2.13.0 and 2.14.0, jacmatch 0.1.0."
    )


def test_published_numbers_stand_in_their_columns():
    assert made.published_row("paper", {"10": 33.8}, ["1", "10"]) == ("paper", "–", "33.80")


def test_what_is_transferred_besides_accuracy_is_one_table():
    table = made.fidelity(DOCUMENT)
    assert table.head == ("n and row", "accuracy %", "agreement %", "ECE %")
    assert table.rows[0] == ("n = 1: a", "60.0 ± 14.1", "50.0 ± 0.0", "3.0 ± 1.4")
    assert table.rows[1][2] == "–"


def test_the_origin_says_data_seeds_and_machine():
    assert made.origin(DOCUMENT) == (
        "Data: digits. Size: cpu. Seeds: 1 to 2. CPU, one thread (Linux), torch 2.13.0, jacmatch 0.1.0."
    )


def test_the_same_lines_give_the_same_bytes():
    lines = by_columns(made.spreads(DOCUMENT, "accuracy"), ["a", "b"], ["1", "10"])
    assert [line.label for line in lines] == ["a", "b"]
    assert lines[0].x == [0.0, 1.0]
    assert lines[0].mean == pytest.approx([60, 80])
    assert lines[1].x == [0.0]
    one, two = (line_figure([("t", lines)], x_label="n", y_label="%", columns=["1", "10"]) for _ in range(2))
    assert one == two
    other = line_figure([("t", [Line("a", [0.0], [1.0])])], x_label="n", y_label="%")
    assert other != one


def test_dots_have_a_bar_where_there_is_a_deviation():
    one = dot_figure([("a", 60.0, 1.0), ("b", 50.0, None)], title="t", x_label="%")
    assert one == dot_figure([("a", 60.0, 1.0), ("b", 50.0, None)], title="t", x_label="%")
    assert one != dot_figure([("a", 60.0, 2.0), ("b", 50.0, None)], title="t", x_label="%")


def test_equal_lines_give_equal_bytes():
    lines = [Line("a", [0.0, 1.0], [60.0, 80.0], [None, 2.0]), Line("b", [0.0], [70.0])]
    one, two = (line_figure([("t", lines)], x_label="n", y_label="%", columns=["1", "10"]) for _ in range(2))
    assert one == two
    assert line_figure([("t", lines[:1])], x_label="n", y_label="%", columns=["1", "10"]) != one


def crowd(count):
    return [Line(f"line {number}", [1.0, 2.0], [float(number), number + 1.0], [0.5, 0.5]) for number in range(count)]


def panels(picture):
    """The panels of an SVG file, and the size of the picture."""
    root = ET.fromstring(picture)
    axes = [each for each in root.iter() if each.get("id", "").startswith("axes_")]
    return len(axes), [float(root.get(key).removesuffix("pt")) for key in ("width", "height")]


def bands(picture):
    return picture.count(b"FillBetweenPolyCollection")


@pytest.mark.parametrize(("count", "shown", "banded"), [(3, 1, 3), (5, 1, 0), (10, 10, 0)])
def test_many_lines_are_drawn_apart_and_without_bands(count, shown, banded):
    picture = line_figure([("t", crowd(count))], x_label="n", y_label="%")
    assert (panels(picture)[0], bands(picture)) == (shown, banded)


def test_many_lines_in_several_panels_have_their_names_at_their_ends():
    few, many = (line_figure([("t", crowd(count)), ("u", crowd(2))], x_label="n", y_label="%") for count in (5, 6))
    assert panels(few)[0] == panels(many)[0] == 2
    assert few.count(b"legend") > 0 == many.count(b"legend")
    assert bands(many) == 2  # of the panel with two lines


def test_a_small_figure_has_its_panels_below_each_other():
    wide, small = (
        panels(line_figure([("t", crowd(2)), ("u", crowd(2))], x_label="n", y_label="%", small=small))
        for small in (False, True)
    )
    assert wide[0] == small[0] == 2
    assert small[1][0] < 340 < wide[1][0]
    assert small[1][1] > wide[1][1]


def test_a_method_has_its_color_in_a_figure():
    picture = line_figure([("t", [Line("values + derivatives", [1.0], [2.0])])], x_label="n", y_label="%").decode()
    assert PALETTE["blue"][0] in picture
    assert PALETTE["orange"][0] not in picture


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.ci
def test_lines_of_a_single_point_are_drawn(count):
    """Error bars at one abscissa of a logarithmic axis; warnings are errors in tests."""
    lines = [Line(f"line {number}", [12.0], [40.0 + number], [0.0]) for number in range(count)]
    for log_x in (False, True):
        assert line_figure([("t", lines), ("u", lines)], x_label="n", y_label="%", log_x=log_x, log_y=True)
