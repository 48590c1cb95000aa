"""Tables and figures of jobs."""

from jacmatch.report import Table
from jacmatch.report.lines import Line, line_figure


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
