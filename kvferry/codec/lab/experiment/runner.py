"""Runs one after the other, each written as soon as it is there, none measured twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry import __version__
from kvferry.codec.lab.evaluate import Setup
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.registry import KINDS
from kvferry.codec.lab.experiment.results import Result, Status, load_result
from kvferry.codec.lab.experiment.series import TIMED, timed_on
from kvferry.codec.lab.experiment.spec import Run
from kvferry.codec.lab.machine import commit, load_average, machine
from kvferry.codec.registry import CODECS
from kvferry.errors import FerryError, OutOfReachError
from kvferry.proto.keys import SINK_TOKENS, WINDOW_TOKENS

Report = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Todo:
    """A run that is still to be done, with what its digest was made of."""

    run: Run
    digest: str
    parts: Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a plan.

    Attributes:
        results: of the runs that were measured now.
        skipped: runs whose results were there.
        stopped: whether runs are left, since it was asked to stop.
    """

    results: Sequence[Result]
    skipped: int
    stopped: bool = False

    def described(self) -> str:
        """For people: one line."""
        counts = dict.fromkeys(Status, 0)
        for result in self.results:
            counts[result.status] += 1
        return (
            f"{counts[Status.MEASURED]} measured, {self.skipped} there already, "
            f"{counts[Status.OUT_OF_REACH]} out of reach, {counts[Status.FAILED]} failed"
        )

    @property
    def failed(self) -> list[Result]:
        """Those with a problem that another setting or text might not have."""
        return [result for result in self.results if result.status is Status.FAILED]


def run_all(
    runs: Sequence[Run],
    bench: Bench,
    folder: Path,
    report: Report,
    *,
    again: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Measure what is not there yet.

    Args:
        folder: where results lie and go.
        report: called with the share of the work that is done, and what is being measured.
        again: measure also what is there.
        stopping: asked between runs.
    Raises: ConfigError: the folder cannot be read or written. Problems of single runs are
        results of theirs.
    """
    todo, problems = [], []
    for run in runs:
        made = _todo(run, bench)
        if isinstance(made, Result):
            made.save(folder)
            problems.append(made)
        elif again or not _there(folder, made):
            todo.append(made)
    skipped = len(runs) - len(todo) - len(problems)
    works = [KINDS[t.run.kind].work(t.run) + w for t, w in zip(todo, _reading(todo), strict=True)]
    total, before, found = sum(works) or 1.0, 0.0, []
    for entry, work in zip(todo, works, strict=True):
        if stopping():
            break
        inner = 0.0

        def done(
            count: int, before: float = before, work: float = work, run: Run = entry.run
        ) -> None:
            nonlocal inner
            inner = min(inner + count, work)
            report((before + inner) / total, run.described())

        report(before / total, entry.run.described())
        result = _measured(entry, bench, done)
        result.save(folder)
        found.append(result)
        before += work
    report(before / total, "")
    return Outcome([*problems, *found], skipped, stopped=len(found) < len(todo))


def _todo(run: Run, bench: Bench) -> Todo | Result:
    parts: dict[str, object] = {"model_id": bench.model_id.hex()}
    try:
        parts["calibration_id"] = bench.known(run.codec).id.hex()
        parts["codec_version"] = CODECS[run.codec.name].version
        parts["text_digest"] = bench.text_digest(run)
        if run.kind == TIMED:  # times of another machine are none of this one's
            parts["machine"] = timed_on(machine())
    except FerryError as exc:
        return Result(
            run=run,
            digest=run.digest(parts),
            about={**about(bench), **parts},
            status=Status.FAILED,
            problem=_line(exc),
        )
    return Todo(run, run.digest(parts), parts)


def _line(exc: FerryError) -> str:
    """Results go into repositories: they do not say where somebody's home is."""
    return str(exc).replace(str(Path.home()), "~")


def _there(folder: Path, entry: Todo) -> bool:
    path = folder / Result(run=entry.run, digest=entry.digest, about={}).file_name
    if not path.is_file():
        return False
    found = load_result(path)
    return found.digest == entry.digest and found.status is not Status.FAILED


def _measured(entry: Todo, bench: Bench, done: Callable[[int], None]) -> Result:
    started = time.perf_counter()
    metrics: Mapping[str, object] = {}
    status, problem = Status.MEASURED, ""
    try:
        metrics = KINDS[entry.run.kind].measure(entry.run, bench, done)
    except OutOfReachError as exc:
        status, problem = Status.OUT_OF_REACH, _line(exc)
    except FerryError as exc:
        status, problem = Status.FAILED, _line(exc)
    return Result(
        run=entry.run,
        digest=entry.digest,
        about={**about(bench), **entry.parts},
        status=status,
        metrics=metrics,
        problem=problem,
        seconds=time.perf_counter() - started,
    )


def about(bench: Bench) -> dict[str, object]:
    """Model, machine and versions, as every result has them."""
    return {
        "model": bench.loaded.name,
        "weights": [path.name for path in bench.loaded.weight_files],
        "quantization": bench.quantization,
        "sinks": SINK_TOKENS,
        "window": WINDOW_TOKENS,
        "hardware": machine(),
        "load": load_average(),
        "kvferry": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _reading(todo: Sequence[Todo]) -> list[float]:
    """Tokens that are read before each run: nothing where the one before had the same text."""
    found, last = [], None
    for entry in todo:
        run = entry.run
        key = (run.text, run.context, run.continuation)
        fresh = bool(run.text) and key != last
        sizes = Setup(codec="", context=run.context or 1, continuation=run.continuation or 1)
        found.append(float(sizes.text_tokens) if fresh else 0.0)
        last = key
    return found
