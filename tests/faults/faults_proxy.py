"""A TCP link that tests can break: hold everything, cut everything, or slow it down."""

import asyncio
import contextlib
import threading
from typing import Self

CHUNK = 64 * 1024


class Link:
    """Passes connections to ``target`` on, from a thread of its own, as ``mode`` says.

    "pass"; "hold": nothing gets through and nobody is told, as in a partition (what was sent
    arrives once it is over); "cut": connections are reset, new ones too. `bytes_per_s` slows
    both directions; 0: as fast as it goes.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.bytes_per_s = 0.0
        self._mode = "pass"
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, mode: str) -> None:
        """Change the mode, for connections that are open as well."""
        self._do(self._set(mode))

    def _do(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _set(self, mode: str) -> None:
        self._mode = mode
        if mode == "hold":
            self._open.clear()
            return
        self._open.set()
        if mode == "cut":
            for writer in list(self._writers):
                writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._set("cut")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await self._open.wait()
        if self._mode == "cut":
            writer.transport.abort()
            return
        host, _, port = self.target.rpartition(":")
        self._writers.add(writer)
        try:
            to_reader, to_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(to_writer)
        try:
            await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
        finally:
            for one in (writer, to_writer):
                self._writers.discard(one)
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._open.wait()
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
