"""What is done to a running site, one function a fault.

Each leaves the site as it found it, so that they can follow each other. `Site.request` checks
every answer: nothing of this may ever change what the model says.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults_harness import Service, Site, prompt, wait_for

# A request may take its deadline (`max_restore_s` of 4 s) and then prefills. What is waited for
# beyond that would be a stall.
PATIENCE_S = 20.0
# Three pages of one layer group, and a tail.
PROMPT_BLOBS = 4
# What a node may hold for the store where that is to be full: one prompt fits, more do not.
QUEUE_BYTES = 800 * 1024


@contextmanager
def _counted(service: Service, *parts: str) -> Iterator[None]:
    """What goes wrong inside is counted by one of these names."""
    before = service.counted(*parts)
    yield
    wait_for(lambda: service.counted(*parts) > before, 10, f"for {parts} to be counted")


def _flip(path: Path, at: int) -> None:
    """One bit; the file's times stay as they are, as on a disk that rots."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _blobs(root: Path) -> list[Path]:
    return sorted(path for path in (root / "blobs").rglob("*") if path.is_file())


def store_killed(site: Site) -> None:
    """kill -9 the store: misses by reason; what is accepted meanwhile arrives by itself."""
    site.offer("n0", 1)
    site.hit("n1", 1)
    site.store.kill()
    reader = site.nodes[1]
    with _counted(reader, "unavailable", "timeout"):
        site.request("n1", 2)
    accepted = site.request("n0", 2, offer=True)
    assert accepted["offered"]
    wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] > 0)
    site.store.start()
    wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
    site.hit("n1", 2)


def store_stopped(site: Site) -> None:
    """SIGSTOP the store: requests end within their deadline, and offers stall nobody."""
    site.offer("n0", 3)
    site.store.send(signal.SIGSTOP)
    try:
        with _counted(site.nodes[1], "timeout", "unavailable"):
            reply = site.request("n1", 4, offer=True)
        assert reply["restore_s"] < PATIENCE_S
        assert reply["offer_s"] < 2.0
        assert reply["slowest_step_s"] < 5.0
    finally:
        site.store.send(signal.SIGCONT)
    site.hit("n1", 3)
    site.hit("n0", 4)


def node_killed(site: Site) -> None:
    """kill -9 a node that has accepted what the store has not: nothing of it is lost."""
    site.links["n0"].set("hold")
    try:
        assert not site.request("n0", 5, offer=True, flush=1.0)["flushed"]
        # All of it gets to the node, and nothing to the store.
        pending = "kvferry_node_uploads_pending"
        wait_for(lambda: site.nodes[0].metrics()[pending] >= PROMPT_BLOBS)
        site.nodes[0].kill()
        site.request("n0", 5, policy="", policy_s=0.0)
    finally:
        site.links["n0"].set("pass")
    site.nodes[0].start()
    wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
    site.joined("n0")
    site.hit("n1", 5)


def node_stopped(site: Site) -> None:
    """SIGSTOP a node: its model goes on without it, and with it again afterwards."""
    site.offer("n0", 6)
    site.nodes[0].send(signal.SIGSTOP)
    try:
        for number in (6, 7):
            reply = site.request("n0", number, offer=True)
            assert reply["restored"] == 0
            assert reply["restore_s"] < PATIENCE_S
            assert reply["offer_s"] < 2.0
            assert reply["slowest_step_s"] < 5.0
        assert sum(v for k, v in reply["counters"].items() if k.startswith("miss_")) >= 2
    finally:
        site.nodes[0].send(signal.SIGCONT)
    site.hit("n0", 6)


def coordinator_killed(site: Site) -> None:
    """kill -9 the coordinator under load, and start it: nobody is kept, nothing is wrong."""
    site.offer("n0", 8)
    site.coordinator.kill()
    site.hit("n1", 8)
    site.offer("n1", 9)
    site.coordinator.start()
    for name in ("n0", "n1"):
        site.joined(name)
    members = 'kvferry_coordinator_members{state="ready"}'
    wait_for(lambda: site.coordinator.metrics()[members] == 2)
    site.hit("n0", 9)


def hook_killed(site: Site) -> None:
    """kill -9 a model's process while it offers: what is there is whole, or a miss."""
    socket = str(site.socket("n0"))
    order = {"socket": socket, "cache_dir": str(site.hook.cache_dir), "policy": site.policy}
    before = site.nodes[0].counted("puts_accepted")
    site.hook.send(do="run", prompt=prompt(10), offer=True, flush=20, **order)
    wait_for(lambda: site.nodes[0].counted("puts_accepted") > before, 30)
    site.hook.kill()
    site.hook.start()
    site.request("n1", 10)
    site.offer("n1", 10)
    site.hit("n0", 10)


def partition(site: Site) -> None:
    """A node and the store do not reach each other: misses, then all is well by itself."""
    site.offer("n0", 11)
    site.links["n1"].set("hold")
    try:
        with _counted(site.nodes[1], "timeout", "unavailable"):
            reply = site.request("n1", 12, offer=True)
        assert reply["restore_s"] < PATIENCE_S
    finally:
        site.links["n1"].set("pass")
    site.hit("n1", 11)
    wait_for(lambda: site.nodes[1].metrics()["kvferry_node_uploads_pending"] == 0)
    site.hit("n0", 12)


def connections_cut(site: Site) -> None:
    """Connections break again and again while blobs are on their way."""
    link = site.links["n0"]
    link.bytes_per_s = 2e6
    try:
        for number in (13, 14):
            site.request("n0", number, offer=True)
            for _ in range(4):
                link.set("cut")
                time.sleep(0.05)
                link.set("pass")
                time.sleep(0.1)
    finally:
        link.bytes_per_s = 0.0
    wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
    for number in (13, 14):
        site.hit("n1", number)


def slow_link(site: Site) -> None:
    """A link that is too slow for a restore's deadline: never wrong, and it ends in time."""
    site.offer("n0", 15)
    site.nodes[0].kill()
    site.forget("n1")
    link = site.links["n1"]
    link.bytes_per_s = 20_000.0
    try:
        reply = site.request("n1", 15)
        assert reply["restore_s"] < PATIENCE_S
    finally:
        link.bytes_per_s = 0.0
    site.hit("n1", 15)
    site.nodes[0].start()
    site.joined("n0")


def store_blobs_damaged(site: Site) -> None:
    """A bit of every blob in the store flips: each is a miss by reason, and set aside."""
    site.offer("n0", 16)
    site.hit("n0", 16)
    for number, path in enumerate(_blobs(site.folder / "store")):
        size = path.stat().st_size
        _flip(path, (size // 2 + 97 * number) % size)
    site.forget("n0", "n1")
    before = site.store.metrics()["kvferry_store_quarantined_blobs"]
    with _counted(site.nodes[1], "corrupt", "not_found"):
        for _ in range(3):
            site.request("n1", 16)
    assert site.store.metrics()["kvferry_store_quarantined_blobs"] > before
    if site.policy == "exact":  # coded again, it comes back again
        site.offer("n1", 16)
        site.hit("n0", 16)


def node_blobs_damaged(site: Site) -> None:
    """The same on a node's own disk: the store has it."""
    site.offer("n0", 17)
    site.hit("n0", 17)
    site.nodes[0].kill()
    for path in _blobs(site.folder / "n0" / "blobs"):
        _flip(path, path.stat().st_size // 3)
    site.nodes[0].start()
    site.joined("n0")
    with _counted(site.nodes[0], "corrupt"):
        site.hit("n0", 17)


def index_damaged(site: Site) -> None:
    """The store's index is overwritten in the middle: it is rebuilt from the blobs."""
    site.offer("n0", 18)
    site.store.kill()
    path = site.folder / "store" / "index.sqlite"
    with sqlite3.connect(path) as database:  # what a crash would leave in the journal
        database.execute("pragma wal_checkpoint(truncate)")
    size = path.stat().st_size
    with path.open("r+b") as file:
        for at in range(0, size, 4096):
            file.seek(at + 64)
            file.write(os.urandom(512))
    site.store.start()
    site.forget("n1")
    site.hit("n1", 18)


def queue_full(site: Site) -> None:
    """What a node may keep for the store is full: offers are dropped and counted, and the model
    does not wait. The site needs an ``upload_queue_bytes`` of `QUEUE_BYTES`."""
    site.store.send(signal.SIGSTOP)
    try:
        with _counted(site.nodes[0], "drop_queue_full"):
            for number in range(20, 26):
                reply = site.request("n0", number, offer=True)
                assert reply["offer_s"] < 2.0
                assert reply["slowest_step_s"] < 5.0
        held = site.nodes[0].metrics()["kvferry_node_uploads_pending_bytes"]
        assert held <= QUEUE_BYTES
    finally:
        site.store.send(signal.SIGCONT)
    wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
    site.offer("n0", 26)
    site.hit("n1", 26)


Scenario = Callable[[Site], None]
# In `make test`: the faults that happen every day.
DAILY: tuple[Scenario, ...] = (
    store_killed,
    store_stopped,
    node_killed,
    partition,
    store_blobs_damaged,
)
RARE: tuple[Scenario, ...] = (
    node_stopped,
    coordinator_killed,
    hook_killed,
    connections_cut,
    slow_link,
    node_blobs_damaged,
    index_damaged,
)
