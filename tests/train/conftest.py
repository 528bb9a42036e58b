"""What trainings in tests have in common."""

from collections.abc import Iterator

import pytest
from trainings import small_digits


@pytest.fixture
def small() -> Iterator[None]:
    """Trainings on digits in this process are of a small network."""
    with small_digits():
        yield
