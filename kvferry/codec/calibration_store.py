"""Calibrations in a local folder: content-addressed, atomic, verified when read."""

import contextlib
import threading
from pathlib import Path

from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.calibration_format import MANIFEST_NAME
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.calibration_set import group_file
from kvferry.codec.files import read_capped, write_atomically
from kvferry.errors import (
    CalibrationCorruptError,
    CalibrationMissingError,
    CodecError,
)
from kvferry.proto.container import DEFAULT_LIMITS, Limits, read_header
from kvferry.proto.keys import DIGEST_BYTES


class CalibrationStore:
    """A folder of calibration blobs; a `kvferry.codec.base.CalibrationSource`.

    Loaded calibrations stay in memory with their folded matrices. Safe to use from
    several threads and processes.
    """

    def __init__(self, folder: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self._folder = folder
        self._limits = limits
        self._lock = threading.Lock()
        self._groups: dict[bytes, GroupCalibration] = {}

    def get(self, calibration_id: bytes) -> GroupCalibration:
        """Raises: CalibrationMissingError; CalibrationCorruptError (the file is set aside)."""
        with self._lock:
            known = self._groups.get(calibration_id)
        if known is not None:
            return known
        found = self._load(calibration_id)
        if not isinstance(found, GroupCalibration):
            raise CalibrationCorruptError(calibration_id.hex()[:16], "is a set, no group")
        with self._lock:  # another thread's copy may already have folded matrices
            return self._groups.setdefault(calibration_id, found)

    def get_set(self, calibration_id: bytes) -> CalibrationSet:
        """Raises: as `get`."""
        found = self._load(calibration_id)
        if not isinstance(found, CalibrationSet):
            raise CalibrationCorruptError(calibration_id.hex()[:16], "is a group, no set")
        return found

    def put(self, calibration: GroupCalibration | CalibrationSet) -> bytes:
        """Keep it; returns its id. Raises: OSError."""
        key, data = calibration.to_blob()
        if not self.has(key.page_key):
            self._write(key.page_key, data)
        if isinstance(calibration, GroupCalibration):
            with self._lock:
                self._groups.setdefault(key.page_key, calibration)
        return key.page_key

    def put_blob(self, data: bytes | memoryview) -> bytes:
        """Verify and keep a calibration blob that came from elsewhere; returns its id.

        Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError.
        """
        found = _read(bytes(data), self._limits)
        self._write(found.id, bytes(data))
        return found.id

    def blob(self, calibration_id: bytes) -> bytes:
        """The stored container, verified. Raises: as `get`."""
        self._load(calibration_id)
        return self._bytes(calibration_id)

    def has(self, calibration_id: bytes) -> bool:
        """Whether a file for it is there (not yet verified)."""
        return self._path(calibration_id).is_file()

    def cut(
        self, group_id: bytes, layers: tuple[int, int], heads: tuple[int, int]
    ) -> GroupCalibration:
        """The cut of a kept group; made once, kept, and found again by its ranges.

        Raises: as `get`; ConfigError for ranges outside the group's.
        """
        group = self.get(group_id)
        if (layers, heads) == (group.layers, group.heads):
            return group
        (a, b), (c, d) = layers, heads
        note = self._folder / f"{group_id.hex()}.L{a}-{b}.H{c}-{d}.cut"
        try:
            found = self.get(bytes.fromhex(read_capped(note, 2 * DIGEST_BYTES).decode()))
            if (found.parent, found.layers, found.heads) == (group_id, layers, heads):
                return found
        except (OSError, ValueError, CodecError):
            pass  # not cut yet, or lost since: it is made again
        found = group.cut(layers, heads)
        self.put(found)
        write_atomically(note, found.id.hex().encode())
        return self.get(found.id)

    def _path(self, calibration_id: bytes) -> Path:
        if len(calibration_id) != DIGEST_BYTES:
            raise CalibrationMissingError(calibration_id.hex())
        return self._folder / group_file(calibration_id)

    def _write(self, calibration_id: bytes, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(calibration_id), data)

    def _bytes(self, calibration_id: bytes) -> bytes:
        try:
            return read_capped(self._path(calibration_id), self._limits.max_blob)
        except OSError as exc:
            raise CalibrationMissingError(calibration_id.hex()) from exc

    def _load(self, calibration_id: bytes) -> GroupCalibration | CalibrationSet:
        data = self._bytes(calibration_id)
        try:
            found = _read(data, self._limits)
            if found.id != calibration_id:
                raise CalibrationCorruptError(calibration_id.hex()[:16], "holds another's content")
        except CodecError as exc:
            path = self._path(calibration_id)
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".damaged"))
            raise CalibrationCorruptError(calibration_id.hex()[:16], str(exc)) from exc
        return found


def _read(data: bytes, limits: Limits) -> GroupCalibration | CalibrationSet:
    if read_header(data, None, limits).codec.name == MANIFEST_NAME:
        return CalibrationSet.from_blob(data, limits)
    return group_from_blob(data, limits)
