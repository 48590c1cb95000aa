"""Tables of jobs."""

from jacmatch.report import Table
from jacmatch.report.tables import speed


def test_a_table_as_markdown_and_csv():
    table = Table("t", "Title", ("row", "n = 1"), (("a | b", "1,5"),), ("A note.",))
    lines = ["**Title**", "", "| row | n = 1 |", "| --- | ---: |", "| a \\| b | 1,5 |", "", "A note.", ""]
    assert table.markdown().splitlines() == lines[:-1]
    assert table.csv() == 'row,n = 1\na | b,"1,5"\n'


def test_a_speed_up_below_one_is_a_slow_down():
    assert speed(1.0) == ("speed-up", "1 ×")
    assert speed(0.25) == ("slow-down", "4 ×")
