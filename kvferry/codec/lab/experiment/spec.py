"""What one run is: everything that its figures depend on, and the digest of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from blake3 import blake3

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """A codec as an experiment names it.

    Attributes:
        name, options: as `make_codec` takes them.
        ratio: fp16 bytes over bytes shipped that the codec's knob is turned to; None: the
            options say it all.
        calibration: a folder, or a name of the file's ``[[calibration]]``; empty: the user's.
        label: what the report calls it.
    """

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    ratio: float | None = None
    calibration: str = ""
    label: str = ""

    @property
    def shown(self) -> str:
        """The label, or the codec's name."""
        return self.label or self.name

    def described(self) -> str:
        """For people: name with options or ratio; what the label says is not said twice."""
        options = [
            f"{name}={value}"
            for name, value in self.options.items()
            if f"{value} {name}" not in self.label
        ]
        parts = [self.shown, *options]
        if self.ratio is not None:
            parts.append(f"{self.ratio:g}x")
        return " ".join(parts)

    def to_json(self) -> dict[str, object]:
        """As results have it."""
        return {
            "name": self.name,
            "options": dict(self.options),
            "ratio": self.ratio,
            "calibration": self.calibration,
            "label": self.label,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One JSON to be written.

    Attributes:
        kind: name in the registry of kinds.
        codec: what is measured; ``raw`` for a run without compression.
        text: name of a text; empty where the kind makes its own.
        context: tokens that the codec codes; continuation: tokens that follow the window.
        settings: the kind's own, plain JSON values.
    """

    kind: str
    codec: CodecSpec
    text: str = ""
    context: int = 0
    continuation: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """As results have it."""
        return {
            "kind": self.kind,
            "codec": self.codec.to_json(),
            "text": self.text,
            "context": self.context,
            "continuation": self.continuation,
            "settings": dict(self.settings),
        }

    def digest(self, about: Mapping[str, object]) -> str:
        """32 hex digits: of the run and of what else its figures depend on.

        Args:
            about: model and calibration ids, digests of texts, versions; JSON values.
        """
        told = {"format": FORMAT, "run": self.to_json(), "about": dict(about)}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"), default=str)
        return blake3(text.encode()).hexdigest()[:32]

    def described(self) -> str:
        """For people: one line."""
        where = " ".join(part for part in (self.text, str(self.context or "")) if part)
        return f"{self.kind} {self.codec.described()} {where}".rstrip()
