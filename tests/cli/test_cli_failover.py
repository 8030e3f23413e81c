"""The figure of a coordinator's failover, measured once with real processes."""

import pytest
from debian_server import program

from kvferry.cli.cluster_bench.failover import measure

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.mark.long
def test_both_failovers_are_measured() -> None:
    program("etcd", "etcd-server")
    found = measure(rounds=1)
    assert set(found) == {
        "failover_s", "failover_median_s", "etcd_failover_s", "etcd_failover_median_s", "rounds",
    }  # fmt: skip
    assert 0 < found["failover_median_s"] <= found["failover_s"]
    assert 0 < found["etcd_failover_median_s"] <= found["etcd_failover_s"]
