"""Conversations from a file: an instruction early, other things, and a test."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kvferry.codec.files import read_capped
from kvferry.codec.lab.instructions.rules import Rule, make_rule
from kvferry.errors import ConfigError

VERSION = 1
MAX_FILE_BYTES = 8 << 20
FILE = "examples.json"


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user said and what the answer was; both are given, neither is generated."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation.

    Attributes:
        kind: "reminder"; "conflict": a later turn says the like of something else;
            "contradiction": one says otherwise of the same, and is not to be believed;
            "instruction": what to answer, once asked; "format": how to answer.
        turns: the first carries what is to be remembered.
        test: what the user says last; only the answer to this is generated.
        rules: an answer is right if it keeps all of them.
    """

    name: str
    kind: str
    turns: Sequence[Turn]
    test: str
    rules: Sequence[Rule]

    def right(self, answer: str) -> bool:
        """Whether an answer keeps every rule."""
        return all(rule.kept(answer) for rule in self.rules)

    def untold(self) -> "Example":
        """The same without its first turn: what a model gets right by guessing."""
        return Example(self.name, self.kind, self.turns[1:], self.test, self.rules)


def load_examples(path: Path | None = None) -> list[Example]:
    """Those of a file, or the ones that come with kvferry.

    Raises: ConfigError: one line that names the file, or the example and what is wrong.
    """
    try:
        if path is None:
            own = resources.files(__package__).joinpath(FILE)
            given = json.loads(own.read_text(encoding="utf-8"))
        else:
            given = json.loads(read_capped(path, MAX_FILE_BYTES))
    except OSError as exc:
        raise ConfigError("examples", str(path), f"a file to read ({exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError("examples", str(path), f"JSON ({exc})") from exc
    if not isinstance(given, Mapping) or given.get("version") != VERSION:
        raise ConfigError("examples", str(path or FILE), f"of version {VERSION}")
    fillers = _table("fillers", given.get("fillers", {}))
    turns = {name: _turn(f"fillers.{name}", value, {}) for name, value in fillers.items()}
    listed = given.get("examples")
    if not isinstance(listed, list) or not listed:
        raise ConfigError("examples", str(path or FILE), "a file with a list of examples")
    found = [_example(f"examples[{i}]", value, turns) for i, value in enumerate(listed)]
    names = [example.name for example in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError("examples: id", twice, "given once")
    return found


def _example(where: str, value: object, fillers: Mapping[str, Turn]) -> Example:
    table = _table(where, value)
    name = _text(where, table, "id")
    turns, rules = table.get("turns"), table.get("rules")
    if not isinstance(turns, list) or len(turns) < 2:
        raise ConfigError(f"{name}: turns", turns, "two or more")
    if not isinstance(rules, list) or not rules:
        raise ConfigError(f"{name}: rules", rules, "one or more")
    return Example(
        name,
        _text(name, table, "kind"),
        tuple(_turn(name, turn, fillers) for turn in turns),
        _text(name, table, "test"),
        tuple(make_rule(name, rule) for rule in rules),
    )


def _turn(where: str, value: object, fillers: Mapping[str, Turn]) -> Turn:
    table = _table(where, value)
    if "filler" not in table:
        return Turn(_text(where, table, "user"), _text(where, table, "assistant"))
    name = _text(where, table, "filler")
    if name not in fillers:
        raise ConfigError(f"{where}: filler", name, f"one of {', '.join(fillers)}")
    return fillers[name]


def _table(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(where, value, "an object")
    return value


def _text(where: str, table: Mapping[str, object], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {key}", value, "a text")
    return value
