"""Small blobs, and real ``kvferry`` processes to move them between."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from kvferry.errors import FerryError
from kvferry.node.client import NodeClient
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

ROOT = blake3(b"root").digest()
MODEL = blake3(b"model").digest()
ANY = "127.0.0.1:0"


def digest(*parts: object) -> bytes:
    """32 bytes that depend on the parts."""
    return blake3(repr(parts).encode()).digest()


def blob(
    name: str,
    *,
    page_key: bytes | None = None,
    previous: bytes = ROOT,
    kind: int = blob_pb2.BLOB_KIND_PAGE,
    layers: tuple[int, int] = (0, 4),
    tokens: tuple[int, int] = (0, 256),
    size: int = 3000,
    codec: str = "raw",
) -> tuple[BlobKey, bytes]:
    """A whole, valid blob of noise and its key; a model of 4 layers x 2 heads."""
    data = os.urandom(size)
    header = blob_pb2.BlobHeader(
        kind=kind,
        model_id=MODEL,
        page_key=page_key or digest(name),
        previous_key=previous,
        token_start=tokens[0],
        token_end=tokens[1],
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=0,
        head_end=2,
        model_layers=4,
        model_heads=2,
        codec=blob_pb2.CodecSpec(name=codec, version=1, params_json="{}"),
    )
    raw = container.pack(header, [container.SectionData("k", data, len(data))])
    return container.key_of(container.read_header(raw)), raw


def chain(count: int, name: str = "chain", **fields: Any) -> list[tuple[BlobKey, bytes]]:
    """One blob for each page of a chain from `ROOT`."""
    keys = [digest(name, i) for i in range(count)]
    return [
        blob(
            name,
            page_key=keys[i],
            previous=keys[i - 1] if i else ROOT,
            tokens=(256 * i, 256 * (i + 1)),
            **fields,
        )
        for i in range(count)
    ]


def wait_for(what: Callable[[], object], seconds: float = 40.0) -> Any:
    """Until ``what`` is true and raises none of our errors; fails when it never is."""
    end = time.monotonic() + seconds
    while True:
        with suppress(FerryError):
            if found := what():
                return found
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.03)


class Service:
    """A ``kvferry`` process that is ready."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        self.log = folder / f"{name}.log"
        ready = folder / f"{name}.ready.json"
        ready.unlink(missing_ok=True)
        full = [sys.executable, "-m", "kvferry", *command, "--ready-file", str(ready)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(full, stdout=log, stderr=log)
        wait_for(lambda: ready.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self.ready: dict[str, Any] = json.loads(ready.read_text())
        self.address: str = self.ready["address"]

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait for its exit code."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        return self.process.wait(60)

    def metrics(self) -> dict[str, float]:
        """The metrics page: sample -> value."""
        with urllib.request.urlopen(f"http://{self.ready['metrics']}/metrics") as page:
            lines = page.read().decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}


class Machines:
    """Services of one test, all stopped at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._services: list[Service] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for service in self._services:
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()

    def _run(self, name: str, *command: str) -> Service:
        service = Service(self.folder, name, *command)
        self._services.append(service)
        return service

    def store(self, *options: str, port: int = 0, name: str = "store") -> Service:
        """A shared store; the same folder for the same name."""
        return self._run(
            name, "store", "--listen", f"127.0.0.1:{port}", "--metrics-listen", ANY,
            "--backend", f"file://{self.folder / name}", "--reserve-bytes", "0", *options,
        )  # fmt: skip

    def coordinator(self, *options: str, port: int = 0) -> Service:
        """A coordinator with quick heartbeats."""
        return self._run(
            "coordinator", "coordinator", "--listen", f"127.0.0.1:{port}",
            "--metrics-listen", ANY, "--data-dir", str(self.folder / "coordinator"),
            "--heartbeat-interval-s", "0.2", *options,
        )  # fmt: skip

    def node(
        self, *options: str, name: str = "n0", store: str = "", coordinator: str = ""
    ) -> Service:
        """A node daemon; the same folder for the same name."""
        return self._run(
            name, "node", "--listen", ANY, "--metrics-listen", ANY, "--node-id", name,
            "--socket", str(self.socket(name)), "--data-dir", str(self.folder / name),
            "--disk-reserve-bytes", "0", "--store", store, "--coordinator", coordinator,
            "--shutdown-timeout-s", "5", *options,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """A command that ends; what it printed."""
        full = [sys.executable, "-m", "kvferry", *command]
        done = subprocess.run(full, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def socket(self, name: str = "n0") -> Path:
        """Unix socket of a node."""
        return self.folder / f"{name}.sock"

    def client(self, name: str = "n0", timeout_s: float = 20.0) -> NodeClient:
        """A hook's client."""
        return self._stack.enter_context(NodeClient(self.socket(name), timeout_s=timeout_s))
