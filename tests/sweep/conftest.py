"""The sweep calls the library as users do, without the type checks of the test suite."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _as_users_run(all_as_users_run):
    return all_as_users_run
