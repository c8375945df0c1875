from collections.abc import Iterator

import pytest

from tests.ranks.pool import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on 1 to 4 warm gloo ranks: see `tests/ranks/pool.py`."""
    ranks = Ranks()
    yield ranks
    ranks.close()
