"""Presets of `lowrank` in the format that other tools for per-head PCA write.

The file is a preset of `kvferry.codec.lab.preset`, which says what it was tuned with, and
holds beside that the fields of the format: model, rank, target, bits, compression_ratio,
baseline_ppl, compressed_ppl, ppl_delta (a share: 0.05 is 5 %), calibration_file,
head_dim, num_layers. A file with the latter alone, from elsewhere, gives its settings.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.codec.files import write_atomically
from kvferry.codec.lab.evaluate import Evaluation
from kvferry.codec.lab.preset import Preset, load_preset, read_json
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_options import LowRankOptions
from kvferry.errors import ConfigError

_SETTINGS = ("rank", "target", "bits")


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPreset:
    """What a file gives.

    Attributes:
        options: as `make_codec` takes them.
        preset: whom it was tuned for and with; None: the file does not say.
        calibration: folder that the file names, if it is there.
    """

    options: Mapping[str, object]
    preset: Preset | None
    calibration: Path | None


def perplexities(results: Sequence[Evaluation]) -> dict[str, float]:
    """``baseline_ppl``, ``compressed_ppl`` and ``ppl_delta`` of several texts together.

    Texts are of one length, so that the loss of all of them is the mean of theirs.
    """
    baseline = _together([result.found.ppl_exact for result in results])
    compressed = _together([result.found.ppl_restored for result in results])
    return {
        "baseline_ppl": baseline,
        "compressed_ppl": compressed,
        "ppl_delta": compressed / baseline - 1.0,
    }


def _together(found: Sequence[float]) -> float:
    return math.exp(sum(math.log(one) for one in found) / len(found))


def fields(
    preset: Preset,
    known: LowRankCalibration,
    results: Sequence[Evaluation],
    calibration: Path,
    out: Path,
) -> dict[str, object]:
    """The whole file's object.

    Args:
        calibration: its folder; named as seen from the preset where it lies below it, so
            that both can move together.
        out: where the file will be.
    """
    asked = LowRankOptions.parse(preset.options)
    dim = known.bases[asked.target[-1]].dim
    folder, here = calibration.resolve(), out.resolve().parent
    file = folder / f"{known.id.hex()}.kvferry"
    shown = os.path.relpath(file, here) if folder.is_relative_to(here) else str(file)
    return {
        **preset.to_json(),
        "rank": asked.rank_of(dim),
        "target": asked.target,
        "bits": asked.bits,
        **perplexities(results),
        "worst_ppl_delta": max(result.found.ppl_delta_pct for result in results) / 100,
        "calibration_file": shown,
        "head_dim": dim,
        "num_layers": known.layers[1],
    }


def save(value: Mapping[str, object], path: Path) -> None:
    """Write what `fields` gave. Raises: ConfigError: it cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(path, (text + "\n").encode())
    except OSError as exc:
        raise ConfigError("preset", str(path), f"a file to write ({exc.strerror})") from exc


def load(path: Path) -> LowRankPreset:
    """Read a preset of kvferry's, or one of the format alone.

    Raises: ConfigError, one line that names the file.
    """
    value = _read(path)
    calibration = _folder(path, value.get("calibration_file"))
    if "kind" in value:
        preset = load_preset(path)
        if preset.codec != "lowrank":
            raise ConfigError("preset", str(path), f"of lowrank, not {preset.codec}")
        return LowRankPreset(dict(preset.options), preset, calibration)
    options = {name: value[name] for name in _SETTINGS if name in value}
    if "rank" not in options:
        raise ConfigError("preset", str(path), "a preset with a rank; `kvferry tune` writes one")
    LowRankOptions.parse(options)
    return LowRankPreset(options, None, calibration)


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError("preset", str(path), "a JSON object, as `kvferry tune` writes it")
    return value


def _folder(path: Path, named: object) -> Path | None:
    """Where the calibration lies that a preset names; None: not there, or none of ours."""
    if not isinstance(named, str) or not named.endswith(".kvferry") or "\0" in named:
        return None
    file = path.parent / named  # an absolute one stays what it is
    return file.parent if file.is_file() else None
