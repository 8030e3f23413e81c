"""What ``kvferry tune`` found, as a file that ``kvferry eval --preset`` takes.

``codec`` and ``options`` are those of a policy's rule too. A ``step`` means something only
together with the calibration that it was tuned with, whose id is in the file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvferry import __version__
from kvferry.codec.files import read_capped, write_atomically
from kvferry.errors import ConfigError
from kvferry.proto.keys import DIGEST_BYTES

KIND = "kvferry/preset/1"
METRICS = ("kl_mean", "ppl_delta_pct")
MAX_FILE_BYTES = 1 << 20
MAX_OPTIONS = 64


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A codec's setting for one model.

    Attributes:
        model: as it was asked for, for people; ``model_id`` is what counts.
        options: as `make_codec` takes them.
        calibration_id: of the calibration set that the options go with; empty: none.
        metric, limit: what was asked of each text: one of `METRICS`, at most so much.
        context, continuation: tokens of each text, as in `Setup`.
        measured: one object per text, see `Tuned`.
        compression_ratio: over all texts together.
    """

    model: str
    model_id: bytes
    codec: str
    options: Mapping[str, object]
    calibration_id: bytes = b""
    metric: str = "kl_mean"
    limit: float = 0.0
    context: int = 0
    continuation: int = 0
    compression_ratio: float = 0.0
    measured: Sequence[Mapping[str, object]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """The file's object."""
        return {
            "kind": KIND,
            "model": self.model,
            "model_id": self.model_id.hex(),
            "codec": self.codec,
            "options": dict(self.options),
            "calibration_id": self.calibration_id.hex(),
            "bound": {"metric": self.metric, "max": self.limit},
            "context_tokens": self.context,
            "continuation_tokens": self.continuation,
            "compression_ratio": self.compression_ratio,
            "measured": [dict(text) for text in self.measured],
            "producer": f"kvferry {__version__}",
        }

    def check(self, model_id: bytes, calibration_id: bytes, where: str) -> None:
        """Whether this is the model, and the calibration, that it was tuned with.

        Args:
            calibration_id: of the calibration set in use; empty: none.
            where: what to name in errors.
        Raises: ConfigError.
        """
        if self.model_id != model_id:
            allowed = f"tuned for this model, not {self.model}: run `kvferry tune`"
            raise ConfigError("preset", where, allowed)
        if self.calibration_id and self.calibration_id != calibration_id:
            found = calibration_id.hex()[:16] or "none"
            allowed = (
                f"used with calibration {self.calibration_id.hex()[:16]} (here is {found}): "
                "give --calibration, or run `kvferry tune` again"
            )
            raise ConfigError("preset", where, allowed)


def save_preset(preset: Preset, path: Path) -> None:
    """Write the file. Raises: ConfigError: it cannot be written."""
    text = json.dumps(preset.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(path, (text + "\n").encode())
    except OSError as exc:
        raise ConfigError("preset", str(path), f"a file to write ({exc.strerror})") from exc


def read_json(path: Path) -> Any:
    """What a preset's file holds, whatever that is. Raises: ConfigError."""
    try:
        return json.loads(read_capped(path, MAX_FILE_BYTES))
    except OSError as exc:
        allowed = f"a preset; `kvferry tune` writes one ({exc.strerror or exc})"
        raise ConfigError("preset", str(path), allowed) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError("preset", str(path), "JSON, as `kvferry tune` writes it") from exc


def load_preset(path: Path) -> Preset:
    """Read what `save_preset` wrote. Raises: ConfigError, one line that names the file."""
    value = read_json(path)
    problem = _problem(value)
    if problem:
        raise ConfigError("preset", str(path), f"as `kvferry tune` writes it: {problem}")
    return Preset(
        model=value["model"],
        model_id=bytes.fromhex(value["model_id"]),
        codec=value["codec"],
        options=value["options"],
        calibration_id=bytes.fromhex(value["calibration_id"]),
        metric=value["bound"]["metric"],
        limit=float(value["bound"]["max"]),
        context=value["context_tokens"],
        continuation=value["continuation_tokens"],
        compression_ratio=float(value["compression_ratio"]),
        measured=value["measured"],
    )


def _problem(value: Any) -> str:
    if not isinstance(value, dict) or value.get("kind") != KIND:
        return f"its kind is not {KIND}"
    if not all(isinstance(value.get(name), str) for name in ("model", "codec")):
        return "model or codec is no text"
    if not _digest(value.get("model_id"), empty=False):
        return "model_id is no digest"
    if not _digest(value.get("calibration_id"), empty=True):
        return "calibration_id is no digest"
    options = value.get("options")
    if not isinstance(options, dict) or len(options) > MAX_OPTIONS:
        return "options are no object"
    if not all(type(option) in (int, float, str) for option in options.values()):
        return "an option is neither number nor text"
    bound = value.get("bound")
    if not isinstance(bound, dict) or bound.get("metric") not in METRICS:
        return f"bound has no metric of {', '.join(METRICS)}"
    if not _number(bound.get("max")) or not _number(value.get("compression_ratio")):
        return "a number is missing"
    if any(type(value.get(n)) is not int for n in ("context_tokens", "continuation_tokens")):
        return "its numbers of tokens are no whole numbers"
    measured = value.get("measured")
    if not isinstance(measured, list) or not all(isinstance(text, dict) for text in measured):
        return "measured is no list of objects"
    return ""


def _digest(value: object, *, empty: bool) -> bool:
    if not isinstance(value, str) or (not value and not empty):
        return False
    try:
        return len(bytes.fromhex(value)) in (DIGEST_BYTES, 0)
    except ValueError:
        return False


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(float(str(value)))
