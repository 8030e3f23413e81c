"""A TOML file as runs."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from kvferry.codec.files import read_capped
from kvferry.codec.lab.experiment.registry import KINDS
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.experiment.texts import check_text
from kvferry.codec.registry import codec_names, make_codec
from kvferry.errors import CalibrationMissingError, ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_RUNS = 20_000
_TABLES = ("experiment", "codec", "calibration")
_OWN = ("model", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """A calibration that the file wants made, of the second halves of texts.

    Runs read the first halves, so nothing is measured on what bases were fitted on.

    Attributes:
        name: as ``calibration = "..."`` of a codec has it.
        codecs: for which ``kvferry calibrate`` is run.
        texts: names of texts; tokens: how many are fitted on, a share from each.
    """

    name: str
    codecs: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: int

    @property
    def folder(self) -> str:
        """Name of its folder: another one if anything of it is changed."""
        told = json.dumps([self.codecs, self.texts, self.tokens])
        return f"{self.name}-{blake3(told.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a file asks for.

    Attributes:
        path: the file; its folder is what names of texts are relative to.
        runs: in order, those that share a text together.
    """

    path: Path
    model: str
    runs: Sequence[Run]
    calibrations: Sequence[CalibrationSpec] = field(default_factory=list)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of all texts that runs read."""
        return tuple(dict.fromkeys(run.text for run in self.runs if run.text))


def load_plan(path: Path, model: str | None = None) -> Plan:
    """Read and check a file.

    Args:
        model: in place of the file's own.
    Raises: ConfigError, one line that names the table and the key.
    """
    value = _parsed(path)
    for key in _TABLES:
        entries = value.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise ConfigError(f"{path.name}: {key}", entries, f"written as [[{key}]]")
    top = {key: item for key, item in value.items() if key not in (*_TABLES, *_OWN)}
    own = Table(path.name, {key: value[key] for key in _OWN if key in value})
    own.text("name", path.stem)
    named = own.text("model", "smollm2")
    calibrations = [
        _calibration(Table(f"{path.name}: calibration {index}", entry), path.parent)
        for index, entry in enumerate(value.get("calibration", []), 1)
    ]
    offered: dict[str, list[CodecSpec]] = {}
    for index, entry in enumerate(value.get("codec", []), 1):
        for spec in _codecs(Table(f"{path.name}: codec {index}", entry)):
            offered.setdefault(spec.shown, []).append(spec)
    runs: list[Run] = []
    asked = set[str]()
    for index, entry in enumerate(value.get("experiment", []), 1):
        table = Table(f"{path.name}: experiment {index}", entry, top, offered)
        kind = table.text("kind")
        if kind not in KINDS:
            raise ConfigError(f"{table.where}: kind", kind, f"one of {', '.join(KINDS)}")
        runs += KINDS[kind].runs(table)
        table.finish()
        asked |= table.asked
    if not runs:
        raise ConfigError(path.name, "no runs", "given an [[experiment]] with texts and codecs")
    if len(runs) > MAX_RUNS:
        raise ConfigError(path.name, f"{len(runs)} runs", f"at most {MAX_RUNS} of them")
    for key in top:
        if key not in asked:
            raise ConfigError(f"{path.name}: {key}", top[key], "a key that an experiment uses")
    for text in dict.fromkeys(run.text for run in runs if run.text):
        check_text(text, path.parent, path.name)
    return Plan(path=path, model=model or named, runs=_together(runs), calibrations=calibrations)


def _parsed(path: Path) -> Mapping[str, list[dict[str, object]]]:
    try:
        return tomllib.loads(read_capped(path, MAX_FILE_BYTES).decode())
    except OSError as exc:
        raise ConfigError("FILE", str(path), f"a file to read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        first = str(exc).splitlines()[0] if str(exc) else "nested too deeply"
        raise ConfigError("FILE", str(path), f"TOML: {first}") from exc


def _codecs(table: Table) -> list[CodecSpec]:
    name = table.text("name")
    if name not in codec_names():
        raise ConfigError(f"{table.where}: name", name, f"one of {', '.join(codec_names())}")
    label = table.text("label", "")
    calibration = table.text("calibration", "")
    options = table.options("options")
    ratios = table.numbers("ratios", (), low=1.0, high=1e4)
    table.finish()
    if options and not ratios:  # a ratio brings an option of its own
        _check_options(table.where, name, options)
    return [
        CodecSpec(name=name, options=options, ratio=ratio, calibration=calibration, label=label)
        for ratio in (ratios or (None,))
    ]


def _check_options(where: str, name: str, options: Mapping[str, object]) -> None:
    """As far as can be without a calibration: a typing error costs no run. Raises: ConfigError."""
    try:
        with suppress(CalibrationMissingError):
            make_codec(name, options)
    except ConfigError as exc:
        if exc.value is not None:  # one that is missing may be what an experiment's ratios turn
            raise ConfigError(f"{where}: {exc.name}", exc.value, exc.allowed) from exc


def _calibration(table: Table, folder: Path) -> CalibrationSpec:
    found = CalibrationSpec(
        name=table.text("name"),
        codecs=table.texts("codecs"),
        texts=table.texts("texts"),
        tokens=table.whole("tokens", 4096, low=512),
    )
    table.finish()
    if not _is_name(found.name):
        raise ConfigError(f"{table.where}: name", found.name, "letters, digits, - and _")
    for text in found.texts:
        check_text(text, folder, table.where)
        if text == "chat":
            raise ConfigError(f"{table.where}: texts", text, "prose, source, or a file")
    for codec in found.codecs:
        if codec not in codec_names():
            raise ConfigError(f"{table.where}: codecs", codec, f"of {', '.join(codec_names())}")
    return found


def _is_name(name: str) -> bool:
    return len(name) <= 64 and all(c.isalnum() or c in "-_" for c in name)


def _together(runs: Sequence[Run]) -> list[Run]:
    """In order, but all that share a text and lengths follow the first of them; no run twice."""
    groups: dict[object, dict[str, Run]] = {}
    for run in runs:
        digest = run.digest({})
        key: object = (run.text, run.context, run.continuation) if run.text else digest
        groups.setdefault(key, {}).setdefault(digest, run)
    return [run for group in groups.values() for run in group.values()]
