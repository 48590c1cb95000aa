"""The wheel stays small, and holds nothing of the studies."""

import zipfile

import pytest

from . import wheel


@pytest.mark.ci
def test_the_wheel_is_within_its_ceiling(tmp_path):
    built = wheel.build(tmp_path)
    size = wheel.size_of(built)
    assert all(value <= ceiling for value, ceiling in zip(size, wheel.CEILING, strict=True)), size
    assert all(ceiling >= aim for ceiling, aim in zip(wheel.CEILING, wheel.AIM, strict=True))
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    assert "jacmatch/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"jacmatch"}
    assert not [name for name in names if "research" in name or "/reproduce/" in name or "/bench/" in name]
