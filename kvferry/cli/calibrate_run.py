"""What ``kvferry calibrate`` does for every codec; what a codec does itself is its `Part`.

Imports the lab: only for commands that were asked to calibrate.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import typer

from kvferry.cli.interrupt import interruptible, stop_signals
from kvferry.cli.output import write_json
from kvferry.codec.calibration import CalibrationSet
from kvferry.codec.lab.checkpoint import Checkpoint, Planned, checkpoint_key
from kvferry.codec.lab.memory import MemoryNeed, free_memory, peak_memory
from kvferry.codec.lab.plan import HeldText, Report
from kvferry.codec.lab.text import CalibrationText, calibration_text
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.codec.mlx.weights import fingerprint
from kvferry.errors import CodecError, ConfigError
from kvferry.node.calibrations import calibration_folder, codec_folder
from kvferry.places import user_dir
from kvferry.proto.identity import model_id

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says, whichever codec it names.

    Attributes:
        text: files to learn from; none: the default text.
        out: where to; None: the user's cache.
        limit: bytes that it may take beyond what it holds; None: what is free.
    """

    model: str
    text: Sequence[Path]
    out: Path | None
    json: str | None
    if_missing: bool
    restart: bool
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Tokens that a run reads, and what reading them takes.

    Attributes:
        fitted: tokens that bases are fitted on.
        source: where those come from, for people.
        held: texts to measure on.
        need: memory of the run.
        work: what its `Report` is called with at the end.
    """

    fitted: Sequence[int]
    source: str
    held: Sequence[HeldText]
    need: MemoryNeed
    work: float


class Part(Protocol[T]):
    """A codec's own part of a calibration; ``T`` is what it fits.

    Attributes:
        codec: its name.
        tokens: of text to fit on.
        places: decimals of the megabytes that people are told.
    """

    codec: str
    tokens: int
    places: int

    @property
    def plan(self) -> Planned:
        """What is asked for; another one does not go on from a state that was kept."""

    def load(self, folder: Path) -> CalibrationSet:
        """What is in a folder. Raises: ConfigError: none for this codec; CodecError."""

    def read(self, loaded: LoadedModel, text: CalibrationText, *, own: bool) -> Texts:
        """Cut texts into tokens. Raises: ModelError, ConfigError: too little text, or a
        model that the codec is not for.

        Args: own: whether ``text`` is the user's.
        """

    def fit(
        self, loaded: LoadedModel, identity: bytes, texts: Texts, report: Report, kept: Checkpoint
    ) -> T:
        """Learn, with a state in ``kept``; raises what ``report`` raises."""

    def save(self, fitted: T, folder: Path) -> CalibrationSet:
        """Write all of it to a folder."""

    def to_json(self, fitted: T, seconds: float) -> Mapping[str, object]:
        """What ``--json`` says beside what it says for all codecs."""

    def lines(self, fitted: T) -> Iterable[str]:
        """For people."""


def run(part: Part[T], asked: Asked) -> None:
    """Fit, write, tell. Raises: FerryError; typer.Exit where a signal ended it."""
    about = asked.model if part.codec == "ferry" else f"{asked.model} for {part.codec}"
    if asked.if_missing and (there := _existing(part, asked)) is not None:
        typer.echo(f"calibration of {about} is there already: {there}", err=True)
        if asked.json is not None:
            write_json({"model": asked.model, "folder": str(there), "made": False}, asked.json)
        return
    started = time.monotonic()
    text = calibration_text(asked.text, part.tokens)
    with stop_signals() as stopping:
        loaded = load_model(asked.model)
        texts = part.read(loaded, text, own=bool(asked.text))
        typer.echo(texts.need.line(), err=True)
        free = free_memory() if asked.limit is None else asked.limit
        texts.need.check(free)
        identity = model_id(fingerprint(loaded))
        folder = asked.out or codec_folder(user_dir("cache"), identity, part.codec)
        unfinished = calibration_folder(user_dir("cache"), identity).with_suffix(".unfinished")
        key = checkpoint_key(identity, texts.fitted, texts.held, part.plan)
        kept = Checkpoint(unfinished, key)
        if asked.restart:
            kept.clear()
        with interruptible(f"calibrating {about}", texts.work, kept.folder, stopping) as report:
            fitted = part.fit(loaded, identity, texts, report, kept)
    made = part.save(fitted, folder)
    _remove_stale(folder, made)
    kept.clear()
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if asked.json is not None:
        told = {
            "model": asked.model,
            "model_id": identity.hex(),
            "codec": part.codec,
            "calibration_id": made.id.hex(),
            "folder": str(folder),
            "made": True,
            "tokens": part.tokens,
            "text_source": made.text_source,
            "bytes": size,
            "memory": {**texts.need.to_json(), "free_bytes": free, "peak_bytes": peak_memory()},
            "seconds": seconds,
        }
        write_json(told | dict(part.to_json(fitted, seconds)), asked.json)
    if asked.json != "-":
        for line in part.lines(fitted):
            typer.echo(f"  {line}")
        typer.echo(f"{folder}: {size / 1e6:.{part.places}f} MB, {seconds:.0f} s")


def _existing(part: Part[T], asked: Asked) -> Path | None:
    """The folder of a calibration that fits the model and can be read, else None."""
    loaded = load_model(asked.model, layers=(0, 1))
    identity = model_id(fingerprint(loaded, (0, len(loaded.model.layers))))
    folder = asked.out or codec_folder(user_dir("cache"), identity, part.codec)
    try:
        found = part.load(folder)
    except (CodecError, ConfigError):
        return None
    return folder if found.model_id == identity else None


def _remove_stale(folder: Path, made: CalibrationSet) -> None:
    """Groups of the calibration that was here before; its blobs name copies in the store."""
    kept = {group.id.hex() for group in made.groups}
    for file in folder.glob("*.kvferry"):
        if file.stem not in kept:
            file.unlink(missing_ok=True)
