"""Each module and operator of PyTorch's own test databases: derivatives are right, or refused clearly.

Not part of `make test`: `PYTHONHASHSEED=0 pytest -q -n 2 -m sweep tests/sweep`. After a change,
`PYTHONHASHSEED=0 python tests/sweep` writes the table again.
"""

import os
from functools import cache

import pytest

from . import table

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]
BEFORE = table.read()


@cache
def families():
    assert os.environ.get("PYTHONHASHSEED") == "0", "the databases iterate over sets: set PYTHONHASHSEED=0"
    from .configurations import families  # reads PyTorch's databases, which takes seconds

    return families()


@pytest.mark.parametrize("family", dict.fromkeys(map(table.family, BEFORE)))
def test_right_or_refused(family):
    from .cells import line

    made = []
    for configuration in families()[family]():
        made.append(configuration.name)
        now, cells = line(configuration)
        verdicts = {now[name] for name in table.DERIVATIVES}
        assert "wrong" not in verdicts, f"{made[-1]}: {cells}"
        assert "raw" not in verdicts or not family.startswith("nn."), f"{made[-1]}: {cells}"
        assert not table.worse(now, BEFORE[made[-1]]), f"{made[-1]}: {cells}, before {BEFORE[made[-1]]}"
    assert made == [name for name in BEFORE if table.family(name) == family]


def test_what_is_not_in_the_table_has_no_floating_point_input():
    missing = set(families()) - set(map(table.family, BEFORE))
    assert not {name for name in missing if any(True for _ in families()[name]())}
