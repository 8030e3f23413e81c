"""A TCP proxy with a bandwidth: what a node behind a slow link sees of the store."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Self

from kvferry.cluster.loop_thread import LoopThread

CHUNK = 8192


class SlowLink:
    """Listens on loopback and passes on to ``address``, so many bytes a second each way."""

    def __init__(self, address: str, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = LoopThread("slow-link")
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._thread.close()

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self._thread.run(what)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.ensure_future(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                await asyncio.sleep(len(data) / self.bytes_per_s)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
