"""What conversations say of a model's memory: Table 1 and Figure 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import measured, newest, table
from kvferry.codec.lab.instructions.plot import Line, Point, draw_accuracy
from kvferry.codec.lab.intervals import paired_difference, wilson

UNCOMPRESSED = "uncompressed"
UNTOLD = "never told"
PICTURE = "instructions"
_UNKNOWN = ["Not measured without compression: nothing can be said of codecs.", ""]


@dataclass(frozen=True, slots=True)
class _Condition:
    """One codec at one setting.

    Attributes:
        line: what it is a point of.
        share: mean of what was held, of all tokens at two bytes a value.
        right: example -> whether its rules were kept.
        kinds: example -> kind.
    """

    line: str
    described: str
    share: float
    right: Mapping[str, bool]
    kinds: Mapping[str, str]

    def of_kind(self, kind: str) -> list[bool]:
        """Whether right, of one kind of example."""
        return [right for name, right in self.right.items() if self.kinds[name] == kind]


def section(results: Sequence[Result], folder: Path) -> list[str]:
    """One part for each set of examples, and length of answers, that was used."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in measured(newest(results)):
        told = result.run.settings
        key = str(told.get("said")), str(told.get("answer_tokens"))
        groups.setdefault(key, []).append(result)
    lines: list[str] = []
    for number, ((_, tokens), own) in enumerate(groups.items()):
        name = f"{PICTURE}-{number + 1}.png" if number else f"{PICTURE}.png"
        if len(groups) > 1:
            lines += [f"Answers of {tokens} tokens at most:", ""]
        lines += _of_examples(own, folder / name)
    return lines or _UNKNOWN


def _of_examples(results: Sequence[Result], picture: Path) -> list[str]:
    conditions = [_condition(result) for result in results]
    conditions = [condition for condition in conditions if condition.right]
    whole = next((c for c in conditions if c.line == UNCOMPRESSED), None)
    if whole is None:
        return _UNKNOWN
    guessed = next((c.right for c in conditions if c.line == UNTOLD), {})
    known = [name for name, right in whole.right.items() if right and not guessed.get(name)]
    lines = [*_baseline(whole, len(known)), *_table(conditions, whole, known)]
    if len(conditions) > 1:
        below = f"{results[-1].about.get('model')}, {len(whole.right)} conversations"
        draw_accuracy(_lines(conditions), below, picture)
        lines += [f"![Figure 1: instructions remembered]({picture.name})", ""]
    return lines


def _condition(result: Result) -> _Condition:
    listed = result.metrics.get("examples")
    examples = [e for e in listed if isinstance(e, Mapping)] if isinstance(listed, list) else []
    if result.run.codec.name == "raw":
        line = described = UNCOMPRESSED if result.run.settings.get("told") else UNTOLD
    else:
        line, described = result.run.codec.shown, result.run.codec.described()
    return _Condition(
        line,
        described,
        result.number("share") or 0.0,
        {str(e["name"]): bool(e["right"]) for e in examples},
        {str(e["name"]): str(e["kind"]) for e in examples},
    )


def _baseline(whole: _Condition, known: int) -> list[str]:
    kinds = dict.fromkeys(whole.kinds.values())
    told = ", ".join(f"{kind} {_counted(whole.of_kind(kind))}" for kind in kinds)
    return [
        f"With its own cache the model answers {_shown(list(whole.right.values()))} of its tests "
        f'right ({told}). "{UNTOLD.capitalize()}" is the same conversation without its first '
        f"turn: what is right there too was guessed. The other {known} can show that something "
        "was forgotten.",
        "",
    ]


def _table(conditions: Sequence[_Condition], whole: _Condition, known: Sequence[str]) -> list[str]:
    """
    Args:
        known: examples that are right without compression, and not by guessing.
    """
    kinds = list(dict.fromkeys(whole.kinds.values()))
    rows = []
    for one in sorted(conditions, key=_order):
        both = [name for name in whole.right if name in one.right]
        own, base = ([c.right[name] for name in both] for c in (one, whole))
        low, high = paired_difference(own, base)
        gap = 100 * (sum(own) - sum(base)) / max(1, len(both))
        still = [one.right[name] for name in known if name in one.right]
        rows.append(
            [
                one.described,
                "-" if one.line == UNTOLD else f"{100 * one.share:.0f} %",
                _shown(list(one.right.values())),
                "" if one is whole else f"{gap:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})",
                _counted(still),
                *(_counted(one.of_kind(kind)) for kind in kinds),
            ]
        )
    return [
        "Table 1. Answers that keep all rules, with 95 % Wilson intervals; the difference to the "
        "uncompressed cache in points, with its 95 % score interval (Tango's) over paired "
        'conversations; "still right" counts those that are right without compression and not '
        "guessed.",
        "",
        *table(["condition", "held", "right", "difference", "still right", *kinds], rows),
        "",
    ]


def _order(condition: _Condition) -> tuple[int, str, float]:
    first = {UNCOMPRESSED: 0, UNTOLD: 1}.get(condition.line, 2)
    return first, condition.line, -condition.share


def _lines(conditions: Sequence[_Condition]) -> list[Line]:
    names = dict.fromkeys(condition.line for condition in sorted(conditions, key=_order))
    return [
        Line(
            name,
            [
                Point(c.share, sum(c.right.values()) / len(c.right), *_interval(c))
                for c in sorted(conditions, key=lambda c: c.share)
                if c.line == name
            ],
            flat=name in (UNCOMPRESSED, UNTOLD),
        )
        for name in names
    ]


def _interval(condition: _Condition) -> tuple[float, float]:
    return wilson(sum(condition.right.values()), len(condition.right))


def _counted(right: Sequence[bool]) -> str:
    return f"{sum(right)}/{len(right)}" if right else ""


def _shown(right: Sequence[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    share = sum(right) / max(1, len(right))
    return f"{100 * share:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
