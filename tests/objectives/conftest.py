"""What several files of tests need."""

import jaxtyping
import pytest


@pytest.fixture
def as_users_run():
    """Without the type checks of the test suite, which would refuse a wrong type before the library does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
