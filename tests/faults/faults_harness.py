"""Real processes that fault tests break: store, coordinator, nodes, and a model's process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from faults_proxy import Link

from kvferry.cluster.policy import named_policy
from kvferry.cluster.policy_file import dump_policy
from kvferry.codec.mlx.openblas import model_environment
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient

ANY = "127.0.0.1:0"
HERE = Path(__file__).parent
VOCABULARY = 64
# Three pages behind the window, and a tail.
PROMPT_TOKENS = 900
Reply = dict[str, Any]


def prompt(number: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """The same tokens for the same number; other ones from the first page on for others."""
    return [
        (7 * i * i + 3 * i + 11 * number * (i + 1) + number) % VOCABULARY for i in range(tokens)
    ]


def wait_for(what: Callable[[], object], seconds: float = 40.0, why: str = "") -> Any:
    """Until ``what`` is true and raises none of our errors; fails when it never is."""
    end = time.monotonic() + seconds
    while True:
        with suppress(FerryError, OSError):
            if found := what():
                return found
        assert time.monotonic() < end, f"waited in vain {why}"
        time.sleep(0.05)


class Service:
    """A ``kvferry`` process that can be killed and started again where it was."""

    def __init__(
        self, folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name, self._command, self._folder = name, list(command), folder
        self.log = folder / f"{name}.log"
        self._ready = folder / f"{name}.ready.json"
        self._environment = {**os.environ, **environment}
        self.wrap: list[str] = []
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self, wait: bool = True) -> None:
        """Start it; afterwards on the ports that it had the first time."""
        self._ready.unlink(missing_ok=True)
        command = [*self.wrap, sys.executable, "-m", "kvferry", *self._command]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(self._ready)],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until it serves. Fails with its log where it ended instead."""
        wait_for(lambda: self._ready.exists() or self.process.poll() is not None, 60, self.name)
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        ready = json.loads(self._ready.read_text())
        self.address, self.scraped = str(ready["address"]), str(ready["metrics"])
        for option, value in (("--listen", self.address), ("--metrics-listen", self.scraped)):
            self._command[self._command.index(option) + 1] = value

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """SIGTERM, and what follows where that is not enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def metrics(self) -> dict[str, float]:
        """The metrics page: sample -> value."""
        with urllib.request.urlopen(f"http://{self.scraped}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    def events(self) -> dict[str, int]:
        """What a node or store counted: event -> how often; refused calls as failed_REASON."""
        found = {}
        for sample, value in self.metrics().items():
            name, _, label = sample.partition("{")
            text = label.partition('"')[2].rpartition('"')[0]
            if name.endswith("_events_total"):
                found[text] = int(value)
            elif name.endswith("_failed_calls_total"):
                found[f"failed_{text}"] = int(value)
        return found

    def counted(self, *parts: str) -> int:
        """How often any event was counted whose name has one of ``parts`` in it."""
        events = self.events().items()
        return sum(count for name, count in events if any(part in name for part in parts))


class Hook:
    """A process that runs a model, and can be killed. ``cache_dir``: its calibrations."""

    def __init__(self, model: Path, folder: Path, cache_dir: Path) -> None:
        self._model, self._folder, self.cache_dir = model, folder, cache_dir
        self._asked = 0
        self.process: subprocess.Popen[str]
        self.start()

    def start(self) -> None:
        """A fresh one."""
        environment = {**os.environ, **model_environment(), "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "faults_hook.py"), str(self._model)]
        with (self._folder / "hook.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def send(self, **order: Any) -> None:
        """Tell it, and do not wait."""
        assert self.process.stdin is not None
        self._asked += 1
        self.process.stdin.write(json.dumps({**order, "number": self._asked}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Reply:
        """The answer to what it was told last."""
        assert self.process.stdout is not None
        reply: Reply = {}
        while reply.get("number") != self._asked:  # a test that failed may have left others
            line = self.process.stdout.readline()
            assert line, (self._folder / "hook.log").read_text()[-2000:]
            reply = json.loads(line)
        assert "failed" not in reply, reply["failed"]
        return reply

    def run(self, tokens: Sequence[int], **more: Any) -> Reply:
        """One request."""
        self.send(do="run", prompt=list(tokens), **more)
        return self.answer()

    def close(self) -> None:
        """Have it let go of all daemons."""
        self.send(do="close")
        self.answer()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def small_model(folder: Path) -> tuple[Path, Path]:
    """(a llama of three layers, the cache folder with its calibration), both in ``folder``."""
    from tiny_llama import save_model, sharp_llama

    model = folder / "model"
    model.mkdir()
    save_model(*sharp_llama(VOCABULARY), model)
    command = ["calibrate", "--model", str(model), "--tokens", "4096", "--json", os.devnull]
    environment = {**os.environ, **model_environment(), "XDG_CACHE_HOME": str(folder)}
    subprocess.run(
        [sys.executable, "-m", "kvferry", *command], env=environment, check=True, timeout=300
    )
    return model, folder / "kvferry"


class Site:
    """Store, coordinator and two nodes, each behind a link to the store of its own.

    Args:
        policy: a built-in one. "exact": every answer equals the uncached run's to the bit.
        options: name of a service -> further options.
        environment: name of a service -> further variables.
    """

    def __init__(
        self,
        folder: Path,
        hook: Hook,
        policy: str = "exact",
        options: Mapping[str, Sequence[str]] | None = None,
        environment: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder, self.hook, self.policy = folder, hook, policy
        self._options, self._environment = options or {}, environment or {}
        self._stack = ExitStack()
        self._services: list[Service] = []
        self._truth: dict[int, Reply] = {}
        self._lost: dict[str, int] = {}  # offers of each node that its hook counted as dropped
        self.links: dict[str, Link] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links.values():
            link.set("pass")
        if self.hook.process.poll() is None:
            self.hook.close()
        for service in reversed(self._services):
            service.end()
        self._stack.close()

    def _service(self, name: str, *command: str) -> Service:
        options = self._options.get(name, ())
        made = Service(self.folder, name, [*command, *options], self._environment.get(name, {}))
        self._services.append(made)
        return made

    def _start(self) -> None:
        file = self.folder / "policy.toml"
        file.write_text(dump_policy(named_policy(self.policy)))
        quiet = ("--listen", ANY, "--metrics-listen", ANY)
        self.store = self._service(
            "store", "store", *quiet, "--backend", f"file://{self.folder / 'store'}",
            "--reserve-bytes", "0",
        )  # fmt: skip
        self.coordinator = self._service(
            "coordinator", "coordinator", *quiet, "--policy-file", str(file),
            "--data-dir", str(self.folder / "coordinator"), "--heartbeat-interval-s", "0.2",
            "--away-after-s", "2",
        )  # fmt: skip
        self.nodes = []
        for name in ("n0", "n1"):
            self.links[name] = self._stack.enter_context(Link(self.store.address))
            self.nodes.append(
                self._service(
                    name, "node", *quiet, "--node-id", name, "--socket", str(self.socket(name)),
                    "--data-dir", str(self.folder / name), "--disk-reserve-bytes", "0",
                    "--store", self.links[name].address, "--coordinator", self.coordinator.address,
                    "--shutdown-timeout-s", "2", "--request-timeout-s", "5",
                )
            )  # fmt: skip
        for name in ("n0", "n1"):
            self.joined(name)

    def socket(self, name: str) -> Path:
        """Of a node."""
        return self.folder / f"{name}.sock"

    def joined(self, name: str) -> None:
        """Until a node knows its namespace, its policy, and its peer."""

        others = all(node.process.poll() is None for node in self.nodes)

        def known() -> bool:
            with NodeClient(self.socket(name), timeout_s=3.0) as client:
                hello = client.hello()
                return bool(
                    hello.namespace_salt
                    and hello.policy.name == self.policy
                    and (client.status().peers or not others)
                )

        wait_for(known, 40, f"for {name} to join")

    def request(self, name: str, number: int, **more: Any) -> Reply:
        """A prompt through a node, checked: as without kvferry, or as it was encoded."""
        order = {"socket": str(self.socket(name)), "cache_dir": str(self.hook.cache_dir)}
        reply = self.hook.run(prompt(number), **{"policy": self.policy, **order, **more})
        self.check(number, reply)
        return reply

    def check(self, number: int, reply: Reply) -> None:
        """Nothing is ever wrong: with an exact codec to the bit of the logits, with another one
        every restored page to the bit of what was encoded."""
        if number not in self._truth:
            self._truth[number] = self.hook.run(prompt(number))
        truth = self._truth[number]
        if self.policy == "exact" or not reply["restored"]:
            assert reply["logits"] == truth["logits"], reply
            assert reply["tokens"] == truth["tokens"]
            return
        encoded = truth.setdefault("encoded", [])
        whole = reply["pages"][: reply["restored"] // 256]
        for page, first in zip(whole, encoded, strict=False):
            assert page == first, "a page is not what was encoded"
        encoded.extend(whole[len(encoded) :])

    def offer(self, name: str, number: int, *, flush: float = 20.0) -> Reply:
        """Prefill, and wait until all of it is in the store. Again, while the model's process
        has not found its daemon yet that was started anew: what it offers then is dropped."""

        def taken() -> Reply | None:
            reply = self.request(name, number, offer=True, flush=flush)
            lost = sum(reply["counters"].get(reason, 0) for reason in ("unavailable", "timeout"))
            before, self._lost[name] = self._lost.get(name, 0), lost
            there = reply["reason"] not in ("unavailable", "timeout") and lost <= before
            return reply if there and (reply["flushed"] or not flush) else None

        return wait_for(taken, 60, f"for {name} to offer prompt {number}")

    def hit(self, name: str, number: int) -> Reply:
        """Until a request is restored whole: recovery without a hand."""
        return wait_for(
            lambda: found if (found := self.request(name, number))["restored"] >= 768 else None,
            60,
            f"for {name} to restore prompt {number}",
        )

    def forget(self, *names: str) -> None:
        """Restart nodes with empty tiers, as new machines would be."""
        for node in self.nodes:
            if node.name in names:
                node.kill()
                shutil.rmtree(self.folder / node.name / "blobs", ignore_errors=True)
                node.start()
                self.joined(node.name)
