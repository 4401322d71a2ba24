"""Who does the work: one of each kind for the whole session, two workers each.

Starting Dask and Ray takes seconds; a test that wants neither starts neither.
"""

from __future__ import annotations

import pytest

from lorafold.scale.local import LocalWorkers
from lorafold.scale.ray import RayExecutor

_PATIENCE = 300  # seconds that a task may take


@pytest.fixture(scope="session")
def workers():
    """Two processes of our own."""
    own = LocalWorkers(2, _PATIENCE)
    yield own
    own.shutdown()


@pytest.fixture(scope="session")
def dask():
    """Dask's executor, on a cluster of two processes on loopback."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # a port of its own, where others run
            memory_limit="2GiB",
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        yield executor


@pytest.fixture(scope="session")
def ray():
    """Ray's executor, on a Ray of two processes on loopback that reports to nobody."""
    found = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found.init(
            "local",
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
        yield RayExecutor("ray")
        found.shutdown()
