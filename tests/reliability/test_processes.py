"""The scripts that kill jobs, which run by hand, still know the functions that they watch."""

from processes import watched


def test_each_function_that_is_watched_is_there():
    assert not [(owner, name) for owner, name, _ in watched() if not callable(getattr(owner, name, None))]
