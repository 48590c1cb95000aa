"""Tables and figures of jobs."""

import xml.etree.ElementTree as ET

import pytest

from jacmatch.report import Table
from jacmatch.report.figures import PALETTE, Line, line_figure
from jacmatch.report.tables import speed


def test_a_table_as_markdown_and_csv():
    table = Table("t", "Title", ("row", "n = 1"), (("a | b", "1,5"),), ("A note.",))
    lines = ["**Title**", "", "| row | n = 1 |", "| --- | ---: |", "| a \\| b | 1,5 |", "", "A note.", ""]
    assert table.markdown().splitlines() == lines[:-1]
    assert table.csv() == 'row,n = 1\na | b,"1,5"\n'


def test_the_same_lines_give_the_same_bytes():
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


def test_a_speed_up_below_one_is_a_slow_down():
    assert speed(1.0) == ("speed-up", "1 ×")
    assert speed(0.25) == ("slow-down", "4 ×")


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.ci
def test_lines_of_a_single_point_are_drawn(count):
    """Error bars at one abscissa of a logarithmic axis; warnings are errors in tests."""
    lines = [Line(f"line {number}", [12.0], [40.0 + number], [0.0]) for number in range(count)]
    for log_x in (False, True):
        assert line_figure([("t", lines), ("u", lines)], x_label="n", y_label="%", log_x=log_x, log_y=True)
