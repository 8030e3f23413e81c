"""Tables of a TOML file, key by key, with one line for whatever is wrong with one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvferry.codec.lab.experiment.spec import CodecSpec
from kvferry.codec.lab.knobs import knob_of
from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError

_SCALARS = (int, float, str, bool)
MAX_LIST = 4096


@dataclass(slots=True)
class Table:
    """One table; keys that it lacks are looked up in ``defaults``.

    Attributes:
        where: what to call it in errors.
        defaults: of the file's top level.
        offered: codecs of the file, by label.
        asked: keys that somebody looked for.
    """

    where: str
    values: Mapping[str, object]
    defaults: Mapping[str, object] = field(default_factory=dict)
    offered: Mapping[str, Sequence[CodecSpec]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def text(self, key: str, default: str | None = None) -> str:
        """Raises: ConfigError, as all of these do."""
        value = self._value(key, default)
        if not isinstance(value, str) or (not value and default != ""):
            raise self._wrong(key, value, "a text")
        return value

    def texts(self, key: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """A list of texts; one text is a list of one."""
        return tuple(
            self._checked(key, v, isinstance(v, str) and bool(v), "texts")
            for v in self._list(key, default)
        )

    def whole(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        """A whole number from ``low`` to ``high``."""
        return self._whole(key, self._value(key, default), low, high)

    def wholes(
        self, key: str, default: Sequence[int] | None = None, low: int = 1, high: int = 1 << 24
    ) -> tuple[int, ...]:
        """A list of whole numbers; one number is a list of one."""
        return tuple(self._whole(key, v, low, high) for v in self._list(key, default))

    def number(
        self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A number from ``low`` to ``high``."""
        return self._number(key, self._value(key, default), low, high)

    def numbers(
        self,
        key: str,
        default: Sequence[float] | None = None,
        low: float = 0.0,
        high: float = 1e12,
    ) -> tuple[float, ...]:
        """A list of numbers; one number is a list of one."""
        return tuple(self._number(key, v, low, high) for v in self._list(key, default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def options(self, key: str) -> dict[str, object]:
        """A table of plain values; empty where there is none."""
        value = self._value(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a table, as { bits = 4 }")
        for name, option in value.items():
            if not isinstance(option, _SCALARS):
                raise self._wrong(f"{key}.{name}", option, "a number or a text")
        return dict(value)

    def has(self, key: str) -> bool:
        """Whether this table or the top level has it."""
        return key in self.values or key in self.defaults

    def codecs(self) -> tuple[CodecSpec, ...]:
        """Those of ``codecs`` (labels; all of the file's by default), at each of ``ratios``.

        ``"*"`` stands for every codec of the registry that has something to turn.
        With ``ratios`` their knobs are turned to those, and entries that differ in nothing
        else are one codec; without, codecs are as ``[[codec]]`` says.
        """
        labels = self.texts("codecs", tuple(self.offered))
        if not labels:
            raise ConfigError(self.where, "no codecs", "given a [[codec]]")
        ratios = self.numbers("ratios", (), low=1.0, high=1e4)
        found: dict[CodecSpecKey, CodecSpec] = {}
        named = [name for label in labels for name in (_turnable() if label == "*" else [label])]
        for label in named:
            specs = self.offered.get(label)
            if specs is None and label in codec_names():
                specs = [CodecSpec(name=label)]
            if specs is None:
                known = ", ".join(dict.fromkeys([*self.offered, *codec_names()]))
                raise self._wrong("codecs", label, f"one of {known}")
            for spec in _at(specs, ratios):
                found[_key(spec)] = spec
        return tuple(found.values())

    def finish(self) -> None:
        """Raises: ConfigError: a key that nobody asked for."""
        for key in self.values:
            if key not in self.asked:
                known = ", ".join(sorted(self.asked))
                raise ConfigError(f"{self.where}: {key}", self.values[key], f"one of {known}")

    def _value(self, key: str, default: object) -> object:
        self.asked.add(key)
        value = self.values.get(key, self.defaults.get(key, default))
        if value is None:
            raise ConfigError(f"{self.where}: {key}", "nothing", "given")
        return value

    def _list(self, key: str, default: object) -> Sequence[object]:
        value = self._value(key, default)
        found = value if isinstance(value, list | tuple) else [value]
        if len(found) > MAX_LIST:
            raise self._wrong(key, f"{len(found)} entries", f"at most {MAX_LIST}")
        return found

    def _whole(self, key: str, value: object, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if type(value) not in (int, float) or not low <= float(str(value)) <= high:
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(str(value))

    def _checked(self, key: str, value: object, good: bool, allowed: str) -> str:
        if not good:
            raise self._wrong(key, value, allowed)
        return str(value)

    def _wrong(self, key: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}", value, allowed)


def _turnable() -> list[str]:
    return [name for name in codec_names() if knob_of(name).option]


CodecSpecKey = tuple[object, ...]


def _key(spec: CodecSpec) -> CodecSpecKey:
    options = tuple(sorted((k, str(v)) for k, v in spec.options.items()))
    return spec.name, options, spec.ratio, spec.calibration, spec.label


def _at(specs: Sequence[CodecSpec], ratios: Sequence[float]) -> Sequence[CodecSpec]:
    if not ratios:
        return specs
    return [
        replace(spec, options=knob_of(spec.name).rest(spec.options), ratio=ratio)
        for spec in specs
        for ratio in ratios
    ]
