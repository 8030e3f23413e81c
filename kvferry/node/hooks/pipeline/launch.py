"""Start the ranks of a small pipeline as processes and speak with all of them at once."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from kvferry.codec.mlx.openblas import model_environment
from kvferry.errors import FerryError


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on right now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


class Ranks:
    """Processes of `kvferry.node.hooks.pipeline.worker`, one a rank.

    Args:
        configs: one JSON-like mapping per rank, see `worker.WorkerConfig`.
        log_dir: where each rank's stderr goes; its end is shown when a rank dies.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]], log_dir: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvferry-ranks-")
        hosts = [[f"127.0.0.1:{port}"] for port in free_ports(len(configs))]
        hostfile = Path(self._folder.name) / "hosts.json"
        hostfile.write_text(json.dumps(hosts))
        self._logs = [log_dir / f"rank{rank}.log" for rank in range(len(configs))]
        self._processes = [
            self._start(rank, config, hostfile, len(configs)) for rank, config in enumerate(configs)
        ]

    def _start(
        self, rank: int, config: Mapping[str, Any], hostfile: Path, ranks: int
    ) -> "subprocess.Popen[str]":
        environment = dict(os.environ) | model_environment()
        # Ranks that share the cores of one machine slow each other down when each
        # starts a thread for every core.
        threads = max(1, (os.cpu_count() or 1) // ranks)
        environment.setdefault("OPENBLAS_NUM_THREADS", str(threads))
        if ranks > 1:
            environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        command = [sys.executable, "-m", "kvferry.node.hooks.pipeline.worker", json.dumps(config)]
        with self._logs[rank].open("a") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Self:
        try:
            self._answers(180.0)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def call(self, cmd: str, timeout_s: float = 300.0, **arguments: Any) -> list[dict[str, Any]]:
        """Give every rank the same command; their answers, by rank.

        Raises: FerryError: a rank failed, died, or did not answer in time.
        """
        line = json.dumps({"cmd": cmd, **arguments}) + "\n"
        for process in self._processes:
            assert process.stdin is not None  # noqa: S101 - opened as a pipe
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError as exc:
                raise FerryError(f"a rank is gone: {self._log_end()}") from exc
        return self._answers(timeout_s)

    def _answers(self, timeout_s: float) -> list[dict[str, Any]]:
        lines: dict[int, str] = {}
        readers = [
            threading.Thread(target=self._read, args=(rank, lines), daemon=True)
            for rank in range(len(self._processes))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout_s)
        answers = []
        for rank in range(len(self._processes)):
            line = lines.get(rank, "")
            if not line:
                state = "gave no answer in time" if rank not in lines else "died"
                self.kill()
                raise FerryError(f"rank {rank} {state}: {self._log_end()}")
            answers.append(json.loads(line))
        for rank, answer in enumerate(answers):
            if not answer["ok"]:
                raise FerryError(f"rank {rank}: {answer['error']}")
        return answers

    def _read(self, rank: int, lines: dict[int, str]) -> None:
        stdout = self._processes[rank].stdout
        assert stdout is not None  # noqa: S101 - opened as a pipe
        lines[rank] = stdout.readline()

    def _log_end(self) -> str:
        ends = [log.read_text()[-600:].strip() for log in self._logs if log.exists()]
        return " | ".join(end for end in ends if end) or "(nothing in its log)"

    def close(self) -> None:
        """End of commands: each rank hands over what is queued and leaves."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
        self.kill()

    def kill(self) -> None:
        """At once, for when something went wrong."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue
        self._folder.cleanup()
