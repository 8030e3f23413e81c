"""A preset file as codecs of single layers.

Two forms are read: what ``kvferry tune`` writes (kind ``kvferry/preset/1``; of lowrank with the
other form's fields in it), and that of the low-rank integration guide alone:

    {"model": "smollm2", "rank": 60, "target": "v", "bits": 16,
     "calibration_file": "calibration/", "identity": "0-4"}

where ``calibration_file`` is a folder or file beside the preset, ``identity`` may be left
out, and other fields (what was measured) are for people.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.codec.base import CalibrationSource, Codec
from kvferry.codec.files import read_capped
from kvferry.codec.lab.preset import KIND, MAX_FILE_BYTES, load_preset
from kvferry.codec.lowrank_options import LowRankOptions
from kvferry.codec.registry import make_codec
from kvferry.errors import CalibrationMissingError, ConfigError
from kvferry.hf.calibrations import AtHand, by_layer, load_groups
from kvferry.node.calibrations import codec_folder
from kvferry.places import user_dir

_OPTIONS = ("rank", "target", "bits", "identity", "ln_nullspace")


@dataclass(frozen=True, slots=True, eq=False)
class Coding:
    """Codecs of a `kvferry.hf.CompressedCache`: one for all layers or one for each."""

    codec: Codec | Mapping[int, Codec]
    identity: frozenset[int]
    calibrations: CalibrationSource


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What both forms say."""

    codec: str
    options: Mapping[str, object]
    calibration: Path | None


def preset_coding(path: Path, calibration: Path | None = None) -> Coding:
    """Raises: ConfigError, CodecError; see `kvferry.hf.CompressedCache.from_preset`."""
    asked = _read(path)
    where = calibration or asked.calibration
    try:
        return Coding(make_codec(asked.codec, asked.options), frozenset(), AtHand())
    except CalibrationMissingError:
        pass
    if where is None:
        raise ConfigError("calibration", None, f"given: preset {path} has codec {asked.codec}")
    return layer_coding(asked.codec, asked.options, where)


def layer_coding(name: str, options: Mapping[str, object], calibration: Path) -> Coding:
    """A codec with a calibration, cut to each of its layers. Raises: as `preset_coding`."""
    cuts = by_layer(load_groups(calibration))
    exact: frozenset[int] = frozenset()
    if name == "lowrank":
        # Exact layers need no codec at all, and one without a coded layer is none.
        exact = frozenset(LowRankOptions.parse(options).exact_layers((0, max(cuts) + 1)))
    codecs = {n: make_codec(name, options, cut) for n, cut in cuts.items() if n not in exact}
    return Coding(codecs, exact, AtHand(cuts.values()))


def _read(path: Path) -> _Asked:
    try:
        value: Any = json.loads(read_capped(path, MAX_FILE_BYTES))
    except OSError as exc:
        raise ConfigError("preset", str(path), f"a file ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError("preset", str(path), "JSON, as `kvferry tune` writes it") from exc
    if not isinstance(value, dict) or not {"kind", "rank"} & set(value):
        allowed = f"a preset: of kind {KIND}, or with rank, target and bits"
        raise ConfigError("preset", str(path), allowed)
    named = value.get("calibration_file")
    if named is not None and not isinstance(named, str):
        raise ConfigError("calibration_file", named, f"text, in preset {path}")
    where = None if named is None else path.parent / named
    if "kind" not in value:
        options = {name: value[name] for name in _OPTIONS if value.get(name) is not None}
        return _Asked("lowrank", options, where)
    preset = load_preset(path)
    if where is None:
        where = codec_folder(user_dir("cache"), preset.model_id, preset.codec)
    return _Asked(preset.codec, preset.options, where)
