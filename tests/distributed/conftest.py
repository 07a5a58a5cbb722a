import pytest
from cluster import Cluster


@pytest.fixture(scope="session")
def cluster():
    processes = Cluster(4)
    yield processes
    processes.stop()
