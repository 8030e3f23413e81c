"""A calibration that was interrupted goes on where it was.

One safetensors file of sums, whose size does not depend on how much text they are of,
and a file for each layer group that is fitted already. Both lie in a folder named by a
digest of model, text and plan, so that another text or plan starts afresh.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from kvferry import __version__
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.covariance import SavedLayout, SavedTensors
from kvferry.codec.files import read_capped, write_atomically
from kvferry.codec.lab.plan import HeldText
from kvferry.errors import CalibrationCorruptError, CodecError
from kvferry.proto.container import DEFAULT_LIMITS
from kvferry.proto.keys import canonical_json

log = logging.getLogger(__name__)

FORMAT = 1
EVERY_S = 20.0
# Writing takes at most so large a share of the time.
_WRITING_SHARE = 0.05
_STATE = "gathered.safetensors"
_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}
_MAX_HEADER_BYTES = 1 << 20


class Planned(Protocol):
    """What a run was asked for."""

    def to_json(self) -> Mapping[str, object]:
        """All that tells one run's result from another's."""


def checkpoint_key(
    model_id: bytes, tokens: Sequence[int], held: Sequence[HeldText], plan: Planned
) -> str:
    """Names what a run computes: model, text, plan, and who computes it."""
    about = {"format": FORMAT, "kvferry": __version__, "plan": dict(plan.to_json())}
    hasher = blake3(b"kvferry/checkpoint/1" + model_id + canonical_json(about))
    for name, part in (("", tokens), *((text.name, text.tokens) for text in held)):
        hasher.update(f"|{name}|{len(part)}|".encode())
        hasher.update(np.asarray(part, dtype="<u4").tobytes())
    return hasher.hexdigest()[:32]


class Checkpoint:
    """State of one run in ``folder / key``; others' states there are left alone.

    Args:
        folder: of one model's unfinished runs.
        key: see `checkpoint_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._root, self.folder = folder, folder / key
        self._next = time.monotonic() + EVERY_S

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._next

    def save(self, tensors: SavedTensors) -> None:
        """Write the state, atomically. A disk that is full costs the state, not the run."""
        started = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / _STATE, tensors)
        except OSError as exc:
            log.warning("no checkpoint in %s: %s", self.folder, exc)
        now = time.monotonic()
        self._next = now + max(EVERY_S, (now - started) / _WRITING_SHARE)

    def load(self, layout: SavedLayout) -> SavedTensors | None:
        """What was saved; None: nothing, or nothing usable, which one line says."""
        path = self.folder / _STATE
        if not path.is_file():
            return None
        try:
            return _read(path, layout)
        except (CodecError, OSError, SafetensorError) as exc:
            log.warning("checkpoint %s is left aside, calibration starts afresh: %s", path, exc)
            return None

    def save_group(self, group: GroupCalibration, part: str = "") -> None:
        """Keep a fitted group, or a ``part`` of it, which is a stream's name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._group(group.layers, part), group.to_blob()[1])
        except OSError as exc:
            log.warning("no checkpoint in %s: %s", self.folder, exc)

    def load_group(
        self, model_id: bytes, layers: tuple[int, int], part: str = ""
    ) -> GroupCalibration | None:
        """A fitted group, or ``part`` of it; None: there is none that is whole."""
        path = self._group(layers, part)
        if not path.is_file():
            return None
        try:
            found = GroupCalibration.from_blob(read_capped(path, DEFAULT_LIMITS.max_blob))
        except (CodecError, OSError) as exc:
            log.warning("%s is left aside: %s", path, exc)
            return None
        return found if (found.model_id, found.layers) == (model_id, layers) else None

    def clear(self) -> None:
        """Forget this run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._root.rmdir()  # the last one of this model

    def _group(self, layers: tuple[int, int], part: str) -> Path:
        name = "-".join(["layers", str(layers[0]), str(layers[1]), *([part] if part else [])])
        return self.folder / f"{name}.kvferry"


def _digest(tensors: Mapping[str, Any]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for name in sorted(tensors):
        hasher.update(name.encode() + b"\0")
        hasher.update(tensors[name].data.cast("B"))
    return hasher.hexdigest()


def _write(path: Path, tensors: SavedTensors) -> None:
    """Safetensors, streamed: the state may be gigabytes and is not copied."""
    data = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    header: dict[str, object] = {"__metadata__": {"digest": _digest(data)}}
    at = 0
    for name, value in data.items():
        header[name] = {
            "dtype": _DTYPES[value.dtype.newbyteorder("<").str],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle, name = tempfile.mkstemp(prefix=".state.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for value in data.values():
                file.write(value.data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, layout: SavedLayout) -> SavedTensors:
    """Raises: CalibrationCorruptError, OSError, SafetensorError. Sizes are checked first."""
    cap = sum(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        for shape, kind in layout.values()
    )
    if path.stat().st_size > cap + _MAX_HEADER_BYTES:
        raise CalibrationCorruptError(path.name, "is larger than any state of this model")
    found = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            if name not in layout or tuple(part.get_shape()) != layout[name][0]:
                raise CalibrationCorruptError(path.name, f"tensor {name!r} does not belong there")
            found[name] = file.get_tensor(name)
            if found[name].dtype.str != layout[name][1]:
                raise CalibrationCorruptError(path.name, f"tensor {name!r} is of another type")
        metadata = file.metadata() or {}
    if metadata.get("digest") != _digest(found):
        raise CalibrationCorruptError(path.name, "its checksum differs")
    return found
