"""A soak: nodes under mixed load while nodes, store and coordinator are killed at random.

What a node has accepted must be in the store at the end, every byte that comes back must be
the one that was put, and memory must not grow.
"""

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from kvferry.cli.cluster_bench.soak_load import Ledger, Load, check_blob, soak_blob
from kvferry.cli.demo.cluster import Service
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient

MIB = 1 << 20
SAMPLE_S = 2.0
DRAIN_S = 180.0
_HAS_BATCH = 500
# Small tiers are full soon, and a leak is not taken for a cache that fills.
_NODE_TIERS = ("--memory-bytes", str(8 * MIB), "--disk-bytes", str(64 * MIB))


class _Part:
    """A service that is killed now and then, and started where it was."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name, self._folder = name, folder
        self._command = [*command, "--listen", "127.0.0.1:0", "--metrics-listen", ""]
        self.start()
        self.address = str(self.service.wait_ready()["address"])
        self._command[-3] = self.address

    def start(self) -> None:
        self.service = Service(self.name, self._command, self._folder)

    def kill(self) -> None:
        self.service.process.kill()
        self.service.process.wait()

    @property
    def resident(self) -> int:
        """Bytes; 0: it does not run."""
        with suppress(psutil.Error):
            return int(psutil.Process(self.service.process.pid).memory_info().rss)
        return 0


class Site:
    """Store, coordinator and ``nodes`` daemons in ``folder``."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.store = _Part(
            "store",
            ["store", "--backend", f"file://{folder / 'store'}", "--reserve-bytes", "0"],
            folder,
        )
        data = str(folder / "coordinator")
        self.coordinator = _Part("coordinator", ["coordinator", "--data-dir", data], folder)
        self.nodes = [self._node(f"n{number}") for number in range(nodes)]

    def _node(self, name: str) -> _Part:
        command = ["node", "--node-id", name, "--socket", str(self.socket(name))]
        command += ["--data-dir", str(self.folder / name), "--store", self.store.address]
        command += ["--coordinator", self.coordinator.address, "--disk-reserve-bytes", "0"]
        return _Part(name, [*command, *_NODE_TIERS, "--log-level", "error"], self.folder)

    def socket(self, name: str) -> Path:
        """Of a node."""
        return self.folder / f"{name}.sock"

    @property
    def parts(self) -> list[_Part]:
        """All of them."""
        return [self.store, self.coordinator, *self.nodes]

    def stop(self) -> None:
        """SIGTERM to all, nodes first."""
        for part in reversed(self.parts):
            part.service.stop()


class _Watch(threading.Thread):
    """Resident bytes of every part, every `SAMPLE_S`; empty where one is down."""

    def __init__(self, site: Site, stop: threading.Event) -> None:
        super().__init__(name="soak-watch", daemon=True)
        self._site, self._stopped = site, stop
        self._began = time.monotonic()
        self.samples: list[tuple[float, dict[str, int]]] = []

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            held = {part.name: part.resident for part in self._site.parts}
            if all(held.values()):
                self.samples.append((time.monotonic() - self._began, held))


def measure(
    minutes: float = 30.0,
    nodes: int = 8,
    ops_per_s: float = 6.0,
    kill_every_s: float = 15.0,
    seed: int = 1,
    plot: Path | None = None,
    on_second: Callable[[float], None] | None = None,
) -> dict[str, object]:
    """Run it.

    Args:
        ops_per_s: of each node's hook: puts, gets and lookups 45 : 40 : 15.
        kill_every_s: on average; one part at a time, SIGKILL, down for up to 4 s.
        plot: PNG of memory over time.
        on_second: gets the seconds gone.
    Returns: ``wrong_bytes`` and ``lost_blobs`` (both must be 0), ``memory_growth_pct``
        (median of all processes together, last quarter against the second), ``kills`` by part,
        ``counts`` of what happened by reason, ``accepted_blobs``.
    Raises: FerryError: a part that does not start.
    """
    dice = random.Random(seed)  # noqa: S311 - chaos, no secret
    stop = threading.Event()
    ledger, kills = Ledger(), dict.fromkeys(("store", "coordinator", "node"), 0)
    with tempfile.TemporaryDirectory(prefix="kvferry-soak-") as name:
        site = Site(Path(name), nodes)
        try:
            watch = _Watch(site, stop)
            loads = [
                Load(site.socket(node.name), ledger, stop, number + seed * 100, ops_per_s)
                for number, node in enumerate(site.nodes)
            ]
            for thread in (watch, *loads):
                thread.start()
            _disturb(site, dice, minutes * 60, kill_every_s, kills, on_second)
            stop.set()
            for thread in (watch, *loads):
                thread.join()
            drained = _drain(site)
            lost = _lost(site, ledger)
            _read_back(site, ledger, dice)
        finally:
            stop.set()
            site.stop()
    if plot is not None:
        _draw(watch.samples, plot)
    return {
        "minutes": minutes,
        "nodes": nodes,
        "accepted_blobs": len(ledger.all_pages()),
        "wrong_bytes": len(ledger.wrong),
        "wrong": ledger.wrong[:20],
        "lost_blobs": len(lost),
        "lost": lost[:20],
        "drained": drained,
        "memory_growth_pct": growth_pct([sum(held.values()) for _, held in watch.samples]),
        "memory_growth_pct_by_part": {
            part.name: growth_pct([held[part.name] for _, held in watch.samples])
            for part in site.parts
        },
        "kills": kills,
        "counts": dict(sorted(ledger.counts.items())),
    }


def growth_pct(values: Sequence[float]) -> float:
    """How much more the last quarter has than the second one, medians, in percent."""
    quarter = len(values) // 4
    if not quarter:
        return 0.0
    early = statistics.median(values[quarter : 2 * quarter])
    return round(100 * (statistics.median(values[-quarter:]) / early - 1), 2)


def _disturb(
    site: Site,
    dice: random.Random,
    seconds: float,
    every_s: float,
    kills: dict[str, int],
    on_second: Callable[[float], None] | None,
) -> None:
    began = time.monotonic()
    due = began + dice.uniform(0.5, 1.5) * every_s
    while (now := time.monotonic()) < began + seconds:
        if on_second is not None:
            on_second(now - began)
        if now < due:
            time.sleep(min(1.0, due - now))
            continue
        part = dice.choice([site.store, site.coordinator, *site.nodes])
        kills[part.name if part.name in kills else "node"] += 1
        part.kill()
        time.sleep(dice.uniform(0.0, 4.0))
        part.start()
        part.service.wait_ready()
        due = time.monotonic() + dice.uniform(0.5, 1.5) * every_s


def _drain(site: Site) -> bool:
    """Until no node has anything left to upload. False: not within `DRAIN_S`."""
    end = time.monotonic() + DRAIN_S
    for node in site.nodes:
        with NodeClient(site.socket(node.name), timeout_s=5.0) as client:
            while True:
                with suppress(FerryError):
                    if not client.status().uploads_pending:
                        break
                if time.monotonic() > end:
                    return False
                time.sleep(0.2)
    return True


def _lost(site: Site, ledger: Ledger) -> list[str]:
    """Accepted blobs that the store does not have."""
    lost: list[str] = []
    pages = ledger.all_pages()
    with SyncBlobStoreClient(site.store.address) as store:
        for at in range(0, len(pages), _HAS_BATCH):
            keys = [soak_blob(*page)[0] for page in pages[at : at + _HAS_BATCH]]
            held = store.has(keys)
            lost += [str(key) for key, there in zip(keys, held, strict=True) if not there]
    return lost


def _read_back(site: Site, ledger: Ledger, dice: random.Random) -> None:
    """Every accepted blob, through some node."""
    clients = [NodeClient(site.socket(node.name), timeout_s=10.0) for node in site.nodes]
    try:
        for chain, page in ledger.all_pages():
            try:
                check_blob(dice.choice(clients), ledger, chain, page)
            except FerryError as exc:
                ledger.count(f"final_get_{exc.reason}")
            else:
                ledger.count("final_get")
    finally:
        for client in clients:
            client.close()


def _draw(samples: Sequence[tuple[float, dict[str, int]]], path: Path) -> None:
    from kvferry.codec.lab.plot_style import COLOURS, check_matplotlib, new_figure, save_png

    check_matplotlib()
    figure = new_figure(8.0, 4.5)
    axes = figure.subplots()
    for name in samples[0][1] if samples else ():
        kind = name if name in ("store", "coordinator") else "nodes"
        axes.plot(
            [at / 60 for at, _ in samples],
            [held[name] / MIB for _, held in samples],
            color=COLOURS[("nodes", "store", "coordinator").index(kind)],
            label=kind if kind == name or name == "n0" else None,
            linewidth=0.8,
        )
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident MiB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.set_title("Memory under load, while parts are killed at random", loc="left")
    save_png(figure, path)
