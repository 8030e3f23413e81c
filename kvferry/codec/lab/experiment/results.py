"""One JSON a run: written so that nobody sees half of one, read back with every check."""

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvferry.codec.files import read_capped, write_atomically
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.errors import ConfigError

KIND = "kvferry/experiment/1"
MAX_FILE_BYTES = 64 << 20
_NAME_CHARS = "abcdefghijklmnopqrstuvwxyz0123456789-"


class Status(enum.StrEnum):
    """What became of a run."""

    MEASURED = "measured"
    OUT_OF_REACH = "out_of_reach"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One run and what was found.

    Attributes:
        digest: of all that the figures depend on; what a later run is skipped by.
        about: model, quantization, hardware, sinks, window, versions, commit, date: JSON.
        metrics: of the kind; empty unless measured.
        problem: one line where it was not measured.
        seconds: what the run took.
    """

    run: Run
    digest: str
    about: Mapping[str, object]
    status: Status = Status.MEASURED
    metrics: Mapping[str, object] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0

    @property
    def file_name(self) -> str:
        """Kind, codec and digest."""
        codec = "".join(c if c in _NAME_CHARS else "-" for c in self.run.codec.shown.lower())
        return f"{self.run.kind}-{codec[:40]}-{self.digest[:12]}.json"

    def number(self, *keys: str) -> float | None:
        """A metric by its path; None where there is none, or it is no number."""
        found: object = self.metrics
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if type(found) not in (int, float):
            return None
        return float(str(found))

    def to_json(self) -> dict[str, object]:
        """The file's object."""
        return {
            "format": KIND,
            "digest": self.digest,
            "status": self.status.value,
            "run": self.run.to_json(),
            **self.about,
            "metrics": _plain(self.metrics),
            "problem": self.problem,
            "seconds": round(self.seconds, 3),
        }

    def save(self, folder: Path) -> Path:
        """Write the file. Raises: ConfigError: it cannot be written."""
        path = folder / self.file_name
        text = json.dumps(self.to_json(), indent=1, allow_nan=False, default=str)
        try:
            write_atomically(path, (text + "\n").encode())
        except OSError as exc:
            raise ConfigError("--out", str(path), f"a file to write ({exc.strerror})") from exc
        return path


def load_results(folder: Path) -> list[Result]:
    """All of a folder by date, then name. Raises: ConfigError: a file that is none of ours."""
    if not folder.is_dir():
        return []
    found = [load_result(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: str(result.about.get("date", "")))


def load_result(path: Path) -> Result:
    """One file. Raises: ConfigError, one line that names it."""
    try:
        value = json.loads(read_capped(path, MAX_FILE_BYTES))
    except OSError as exc:
        raise ConfigError("result", str(path), f"a file to read ({exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError("result", str(path), "JSON, as `kvferry experiment` writes it") from exc
    try:
        return _result(value)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        allowed = "as `kvferry experiment` writes it: move it elsewhere"
        raise ConfigError("result", str(path), allowed) from exc


def _result(value: Mapping[str, object]) -> Result:
    if value["format"] != KIND:
        raise ValueError("another format")
    run, metrics = value["run"], value["metrics"]
    if not isinstance(run, Mapping) or not isinstance(metrics, Mapping):
        raise TypeError("no object")
    codec, settings = run["codec"], run["settings"]
    if not isinstance(codec, Mapping) or not isinstance(settings, Mapping):
        raise TypeError("no object")
    load = value.get("load")
    if not isinstance(load, int | float | None) or isinstance(load, bool):
        raise TypeError("no number")
    ratio = codec["ratio"]
    spec = CodecSpec(
        name=str(codec["name"]),
        options=dict(codec["options"]),
        ratio=None if ratio is None else float(ratio),
        calibration=str(codec["calibration"]),
        label=str(codec["label"]),
    )
    given = {"format", "digest", "status", "run", "metrics", "problem", "seconds"}
    return Result(
        run=Run(
            kind=str(run["kind"]),
            codec=spec,
            text=str(run["text"]),
            context=int(str(run["context"])),
            continuation=int(str(run["continuation"])),
            settings=dict(settings),
        ),
        digest=str(value["digest"]),
        about={name: item for name, item in value.items() if name not in given},
        status=Status(str(value["status"])),
        metrics=dict(metrics),
        problem=str(value["problem"]),
        seconds=float(str(value["seconds"])),
    )


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity: what could not be measured is null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
