"""Clients of one process that come and go at once."""

import logging
import threading
import time

import pytest

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.loop_thread import LoopThread
from kvferry.node.client import NodeClient

ROUNDS = 15
AT_ONCE = 8


@pytest.mark.processes
def test_clients_that_close_do_not_disturb_the_others(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """grpc hands completions to whichever client's loop is awake, for closed ones too."""

    def come_and_go(index: int) -> None:
        with NodeClient(cluster.sockets[0]) as client:
            client.hello()
            client.watch(lambda _: None)
            time.sleep(0.02 * (index % 4))

    with caplog.at_level(logging.WARNING):
        for _ in range(ROUNDS):
            threads = [threading.Thread(target=come_and_go, args=(i,)) for i in range(AT_ONCE)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert [record.getMessage() for record in caplog.records] == []


def test_a_closed_loop_takes_nothing_more() -> None:
    async def work() -> int:
        return 1

    thread = LoopThread()
    assert thread.run(work()) == 1
    thread.close()
    # As grpc does with what comes late: nobody waits for it, and it is no error.
    assert thread._loop.call_soon_threadsafe(print, "late") is not None
    with pytest.raises(RuntimeError, match="closed"):
        thread.run(work())
