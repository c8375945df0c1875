import pathlib

import pytest

from tests.support import workload
from tests.support.cluster import Cluster


@pytest.fixture(scope="session")
def recipe(cluster: Cluster) -> pathlib.Path:
    """A small recipe over FSDP2 that all nodes can read."""
    folder = cluster.folder / "work"
    folder.mkdir()
    return workload.make(folder)
