"""A restore from one peer and from three: real node processes, each link throttled.

The links are token buckets in the daemons that send (``serve_bytes_per_s``), so that one
machine can play four; what is fetched is one lookup's blobs, through the daemon's socket.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from blake3 import blake3

from kvferry.cli.demo.cluster import Service
from kvferry.cluster.repository import LookupQuery
from kvferry.errors import FerryError, StoreTimeoutError
from kvferry.node.client import NodeClient
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

PEERS = 3
PAGES, GROUPS, BLOB_BYTES = 16, 3, 96 * 1024
LINK_BYTES_PER_S = 3e6
ROUNDS = 3
DEADLINE_S = 120.0
KNOWN_S = 60.0
NO_STORE = "127.0.0.1:1"  # nobody listens on port 1

Blobs = Sequence[tuple[BlobKey, bytes]]


def measure(
    link_bytes_per_s: float = LINK_BYTES_PER_S, pages: int = PAGES, rounds: int = ROUNDS
) -> dict[str, float]:
    """Seconds to have all blobs of one lookup, medians of ``rounds``, and their ratio.

    Each round: one chain of pages that one peer holds, and one that all three hold; the
    asking node has neither. Raises: FerryError: a process did not start, a blob was wrong.
    """
    with tempfile.TemporaryDirectory(prefix="kvf-") as name, ExitStack() as stack:
        clients = _nodes(Path(name), stack, link_bytes_per_s)
        asking, holding = clients[-1], clients[:-1]
        times: dict[int, list[float]] = {1: [], PEERS: []}
        for number in range(rounds):
            for count, taken in times.items():
                chain = _chain(f"{number}/{count}", pages)
                for holder in holding[:count]:
                    for key, data in chain:
                        holder.put(key, data)
                taken.append(_restore(asking, chain))
        counters = dict(asking.status().counters)
    one, several = (statistics.median(times[count]) for count in (1, PEERS))
    return {
        "peers_1_s": one,
        f"peers_{PEERS}_s": several,
        "peers_ratio": one / several,
        "peers_bytes": float(pages * GROUPS * BLOB_BYTES),
        "peers_link_bytes_per_s": link_bytes_per_s,
        "peers_hedges": float(counters.get("hedges", 0)),
        "peers_extra_bytes": float(counters.get("hedge_extra_bytes", 0)),
    }


def _nodes(folder: Path, stack: ExitStack, rate: float) -> list[NodeClient]:
    """Daemons that know each other; the last one holds nothing and is not throttled."""
    quiet = ("--listen", "127.0.0.1:0", "--metrics-listen", "")
    place = ("--data-dir", str(folder / "coordinator"))
    coordinator = Service("coordinator", ["coordinator", *quiet, *place], folder)
    stack.callback(coordinator.stop)
    address = coordinator.wait_ready()["address"]
    services = []
    for index in range(PEERS + 1):
        command = [
            "node", *quiet, "--node-id", f"n{index}", "--store", NO_STORE,
            "--coordinator", address, "--socket", str(folder / f"n{index}.sock"),
            "--data-dir", str(folder / f"n{index}"), "--disk-reserve-bytes", "0",
            "--shutdown-timeout-s", "1",
            "--serve-bytes-per-s", str(rate if index < PEERS else 0),
        ]  # fmt: skip
        services.append(Service(f"n{index}", command, folder))
        stack.callback(services[-1].stop)
    for service in services:
        service.wait_ready()
    clients = [
        stack.enter_context(NodeClient(folder / f"n{index}.sock", timeout_s=DEADLINE_S))
        for index in range(PEERS + 1)
    ]
    end = time.monotonic() + KNOWN_S
    while any(len(client.status().peers) < PEERS for client in clients):
        if time.monotonic() > end:
            raise StoreTimeoutError("the coordinator", "the nodes did not learn of each other")
        time.sleep(0.1)
    return clients


def _restore(client: NodeClient, chain: Blobs) -> float:
    """Seconds for a lookup and all that it found."""
    page_keys = list(dict.fromkeys(key.page_key for key, _ in chain))
    started = time.monotonic()
    found = client.lookup(LookupQuery(root=_digest("root"), page_keys=page_keys))
    keys = [info.key for page in found.pages for info in page]
    answers = client.get_many(keys, DEADLINE_S)
    took = time.monotonic() - started
    lost = [key for key, data in chain if not _same(answers.get(key), data)]
    if lost:
        raise FerryError(f"{len(lost)} of {len(chain)} blobs did not come as they were put")
    return took


def _same(answer: memoryview | FerryError | None, data: bytes) -> bool:
    return isinstance(answer, memoryview) and bytes(answer) == data


def _chain(name: str, pages: int) -> Blobs:
    """Blobs of noise, each layer group of each page."""
    made = []
    previous = _digest("root")
    for page in range(pages):
        page_key = _digest(f"{name}/{page}")
        for group in range(GROUPS):
            header = blob_pb2.BlobHeader(
                kind=blob_pb2.BLOB_KIND_PAGE,
                model_id=_digest("model"),
                page_key=page_key,
                previous_key=previous,
                token_start=256 * page,
                token_end=256 * (page + 1),
                layer_start=group,
                layer_end=group + 1,
                head_start=0,
                head_end=1,
                model_layers=GROUPS,
                model_heads=1,
                codec=blob_pb2.CodecSpec(name="raw", version=1, params_json="{}"),
            )
            noise = os.urandom(BLOB_BYTES)
            raw = container.pack(header, [container.SectionData("k", noise, len(noise))])
            made.append((container.key_of(container.read_header(raw)), raw))
        previous = page_key
    return made


def _digest(name: str) -> bytes:
    return blake3(name.encode()).digest()
