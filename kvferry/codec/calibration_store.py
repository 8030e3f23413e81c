"""Calibrations in a local folder: content-addressed, atomic, verified when read."""

from pathlib import Path

from kvferry.codec.calibration import CalibrationSet, GroupCalibration


class CalibrationStore:
    """A folder of calibration blobs; a `kvferry.codec.base.CalibrationSource`.

    Loaded calibrations stay in memory with their folded matrices. Safe to use from
    several threads and processes.
    """

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    def get(self, calibration_id: bytes) -> GroupCalibration:
        """Raises: CalibrationMissingError; CalibrationCorruptError (the file is set aside)."""
        raise NotImplementedError

    def get_set(self, calibration_id: bytes) -> CalibrationSet:
        """Raises: as `get`."""
        raise NotImplementedError

    def put(self, calibration: GroupCalibration | CalibrationSet) -> bytes:
        """Keep it; returns its id."""
        raise NotImplementedError

    def put_blob(self, data: bytes | memoryview) -> bytes:
        """Verify and keep a calibration blob that came from elsewhere; returns its id."""
        raise NotImplementedError

    def blob(self, calibration_id: bytes) -> bytes:
        """The stored container, verified. Raises: as `get`."""
        raise NotImplementedError

    def has(self, calibration_id: bytes) -> bool:
        """Whether a file for it is there (not yet verified)."""
        raise NotImplementedError

    def cut(
        self, group_id: bytes, layers: tuple[int, int], heads: tuple[int, int]
    ) -> GroupCalibration:
        """The cut of a kept group; made once, kept, and found again by its ranges."""
        raise NotImplementedError
