"""What commands that measure a codec have in common: model, calibration, texts, output."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.errors import ConfigError, IdentityMismatchError

if TYPE_CHECKING:
    from kvferry.codec.calibration import CalibrationSet, CurvePoint, GroupCalibration
    from kvferry.codec.mlx.load import LoadedModel

CALIBRATED = frozenset({"ferry", "kvtc", "lowrank"})


def check_output(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse at once what could not be written after minutes of work. Raises: ConfigError."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(option, str(path), f"a file that ends in {' or '.join(suffixes)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(option, str(path), f"in a folder that exists: {folder} does not")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(option, str(path), "a file that can be written")


def check_codec(name: str) -> None:
    """Raises: ConfigError: no such codec."""
    from kvferry.codec.registry import codec_names

    if name not in codec_names():
        raise ConfigError("--codec", name, f"one of {', '.join(codec_names())}")


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A codec's calibration for a model; empty for codecs without."""

    found: "CalibrationSet | None" = None
    groups: "Sequence[GroupCalibration]" = ()
    folder: Path | None = None

    @property
    def curve(self) -> "Sequence[CurvePoint]":
        """Measured rate against KL."""
        return () if self.found is None else self.found.curve

    @property
    def id(self) -> bytes:
        """Of the set; empty: none."""
        return b"" if self.found is None else self.found.id


def open_model(name: str) -> "tuple[LoadedModel, bytes]":
    """The model and its id. Raises: ModelError."""
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.proto.identity import model_id

    loaded = load_model(name)
    return loaded, model_id(fingerprint(loaded))


def calibration_of(codec: str, folder: Path | None, identity: bytes) -> Known:
    """What ``kvferry calibrate`` left for this model, where the codec needs it.

    Args:
        folder: None: the user's cache. Those of kvtc and lowrank may lie in a folder
            of their name in it.
    Raises: ConfigError: there is none; IdentityMismatchError: it is another model's.
    """
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.calibration_set import SET_FILE
    from kvferry.codec.kvtc_calibration import KvtcCalibration
    from kvferry.codec.lowrank_calibration import LowRankCalibration
    from kvferry.codec.mlx.device import device_products
    from kvferry.node.calibrations import codec_folder
    from kvferry.places import user_dir

    if codec not in CALIBRATED:
        return Known()
    groups: Sequence[GroupCalibration]
    if folder is None:
        folder = codec_folder(user_dir("cache"), identity, codec)
    elif codec != "ferry" and (folder / codec / SET_FILE).is_file():
        folder = folder / codec
    if codec != "ferry" and not (folder / SET_FILE).is_file():
        allowed = f"a folder with {SET_FILE}; `kvferry calibrate --codec {codec}` writes one"
        raise ConfigError("calibration", str(folder), allowed)
    if codec == "kvtc":
        found, whole = KvtcCalibration.load(folder)
        groups = [whole]
    else:
        found, groups = CalibrationSet.load(folder)
    if isinstance(groups[0], LowRankCalibration) is not (codec == "lowrank"):
        made_by = f"of {codec}; `kvferry calibrate --codec {codec}` makes one"
        raise ConfigError("calibration", str(folder), made_by)
    if found.model_id != identity:
        raise IdentityMismatchError("model", found.model_id.hex()[:16], identity.hex()[:16])
    return Known(found, [group.using(device_products()) for group in groups], folder)


def text_names(files: Sequence[Path]) -> list[str]:
    """A short name for each file, the path where two are called the same."""
    short = [file.name for file in files]
    return [
        name if short.count(name) == 1 else str(file)
        for name, file in zip(short, files, strict=True)
    ]
