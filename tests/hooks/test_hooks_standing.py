"""A model that starts together with its cluster waits until that knows who it is."""

import signal
import threading
from pathlib import Path

import pytest

from kvferry.cli.demo.cluster import Cluster, Service
from kvferry.codec.mlx.load import LoadedModel
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache


@pytest.mark.processes
def test_a_daemon_whose_coordinator_answers_later_is_waited_for(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, nodes=0)
    cluster.set_policy("exact")
    with cluster:
        coordinator = cluster.service("coordinator")
        address = coordinator.wait_ready()["address"]
        coordinator.process.send_signal(signal.SIGSTOP)
        later = threading.Timer(2.0, coordinator.process.send_signal, [signal.SIGCONT])
        socket = tmp_path / "late.sock"
        node = Service(
            "late",
            (
                "node", "--listen", "127.0.0.1:0", "--metrics-listen", "",
                "--socket", str(socket), "--data-dir", str(tmp_path / "late"),
                "--coordinator", address,
            ),
            tmp_path,
        )  # fmt: skip
        try:
            node.wait_ready()
            with PrefixCache(tiny, HookOptions(socket=socket, cache_dir=tmp_path)) as prefix:
                assert not prefix.ready(timeout_s=0)
                later.start()
                assert prefix.ready()
        finally:
            later.cancel()
            coordinator.process.send_signal(signal.SIGCONT)
            node.stop()


def test_a_daemon_that_is_not_there_is_not_waited_for(tiny: LoadedModel, tmp_path: Path) -> None:
    done = threading.Event()

    def wait() -> None:
        with PrefixCache(tiny, HookOptions(socket=tmp_path / "nobody.sock")) as prefix:
            assert not prefix.ready(timeout_s=600)
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    assert done.wait(60)
