"""What needles say of a model and of codecs, as Markdown and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import measured, newest, table
from kvferry.codec.lab.needles.plot import Curve, CurvePoint, draw_recall
from kvferry.codec.lab.needles.summary import Recall, mean, number, recall, shown

Needle = Mapping[str, object]
Place = tuple[object, ...]
EXACT = "raw"
PICTURE = "needles.png"
# Below this the model fails without any codec, and says nothing about one.
FAIR = 0.5


@dataclass(frozen=True, slots=True)
class _Setting:
    """A codec as it was asked for, over all lengths and seeds."""

    codec: str
    described: str
    ratio: float
    needles: Sequence[Needle]  # one that two files ask for counts once


def section(results: Sequence[Result], folder: Path) -> list[str]:
    """Uncompressed recall, then each codec's, and their curves."""
    own = measured(newest(results))
    exact = {
        _place(result, needle): needle
        for result in own
        if result.run.codec.name == EXACT
        for needle in _needles_of(result)
    }
    lines = _uncompressed(list(exact.values()))
    settings = _settings([result for result in own if result.run.codec.name != EXACT])
    fair = {place: needle for place, needle in exact.items() if bool(needle["exact"])}
    if not settings:
        return [*lines, "No codec was measured."]
    lines += _codecs(settings, fair)
    if not fair:
        return lines
    model = str(own[-1].about.get("model"))
    told = f"{model}; with its own cache it finds {len(fair)} of {len(exact)} needles"
    lengths = _common_lengths(settings)
    base = recall(needle for needle in fair.values() if _length(needle) in lengths)
    draw_recall(_curves(settings, fair, lengths), base, told, folder / PICTURE)
    return [*lines, f"![Recall against compression]({PICTURE})"]


def _needles_of(result: Result) -> list[Needle]:
    """Those of a result that can be read; with their seed."""
    listed = result.metrics.get("needles")
    if not isinstance(listed, Sequence):
        return []
    seed = result.run.settings.get("seed")
    return [{**needle, "seed": seed} for needle in listed if isinstance(needle, Mapping)]


def _place(result: Result, needle: Needle) -> Place:
    return result.run.text, *(needle[k] for k in ("length", "seed", "depth", "needles", "key"))


def _uncompressed(exact: Sequence[Needle]) -> list[str]:
    if not exact:
        return ["Not measured without compression: nothing can be said of codecs.", ""]
    depths = sorted({number(n, "depth") for n in exact if n["needles"] == 1})
    lengths = sorted({_length(n) for n in exact})
    rows, weak = [], []
    for length in lengths:
        own = [n for n in exact if _length(n) == length]
        single = [n for n in own if n["needles"] == 1]
        cells = [_counted(n for n in single if number(n, "depth") == d) for d in depths]
        cells += [shown(recall(single)), shown(recall(n for n in own if n["needles"] != 1))]
        rows.append([f"{length:,}", *cells])
        found = recall(own)
        if found is not None and found.share < FAIR:
            weak.append(f"{length:,}")
    head = ["tokens", *(f"depth {depth:g}" for depth in depths), "one needle", "several"]
    lines = [
        "What the model finds with its own cache: exact matches of asked; depth 0 is far from "
        "the question, 1 is near, and all are outside of what is kept exact. A codec can be "
        "judged only where this is high; in brackets 95 % Wilson intervals.",
        "",
        *table(head, rows),
        "",
    ]
    if weak:
        lines += [f"At {', '.join(weak)} tokens it fails mostly by itself.", ""]
    return lines


def _counted(needles: Iterable[Needle]) -> str:
    found = recall(needles)
    return "" if found is None else f"{found.found}/{found.asked}"


def _settings(results: Sequence[Result]) -> list[_Setting]:
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.run.codec.described(), []).append(result)
    return [
        _Setting(
            own[0].run.codec.shown,
            described,
            mean([r.number("compression_ratio") or 0.0 for r in own]),
            list(
                {
                    place: {**needle, "place": place}
                    for result in own
                    for needle in _needles_of(result)
                    for place in [_place(result, needle)]
                }.values()
            ),
        )
        for described, own in grouped.items()
    ]


def _codecs(settings: Sequence[_Setting], fair: Mapping[Place, Needle]) -> list[str]:
    every = [needle for one in settings for needle in one.needles]
    lengths = sorted({_length(needle) for needle in every})
    depths = sorted({number(n, "depth") for n in every if n["needles"] == 1})
    rows = []
    for one in sorted(settings, key=lambda s: (s.codec, s.ratio)):
        both = recall(one.needles)
        if both is None:
            continue
        single = [n for n in one.needles if n["needles"] == 1]
        cells = [_counted(n for n in single if _length(n) == length) for length in lengths]
        cells += [
            " ".join(_counted(n for n in single if number(n, "depth") == d) for d in depths),
            _counted(n for n in one.needles if n["needles"] != 1),
        ]
        cells += [shown(_still(one.needles, fair)), f"{both.log_prob:.2f}"]
        rows.append([one.described, f"{one.ratio:.1f}", *cells, f"{100 * both.kept:.0f} %"])
    head = ["codec", "ratio", *(f"{length:,}" for length in lengths), "far to near", "several"]
    return [
        'Codecs: exact matches, one needle by length and by depth. "Still found" counts only '
        "needles that the model finds with its own cache; the key's log-probability shows what "
        "exact matches are too coarse for.",
        "",
        *table([*head, "still found", "key, nats per token", "needle's tokens kept"], rows),
        "",
    ]


def _length(needle: Needle) -> int:
    return int(number(needle, "length"))


def _still(needles: Iterable[Needle], fair: Mapping[Place, Needle]) -> Recall | None:
    return recall(n for n in needles if n["place"] in fair)


def _common_lengths(settings: Sequence[_Setting]) -> set[int]:
    """Lengths that every setting was measured at, or all if there is none such."""
    lengths = [{_length(needle) for needle in one.needles} for one in settings]
    return set.intersection(*lengths) or set.union(*lengths)


def _curves(
    settings: Sequence[_Setting], fair: Mapping[Place, Needle], lengths: set[int]
) -> list[Curve]:
    found = []
    for name in dict.fromkeys(setting.codec for setting in settings):
        points = []
        for one in sorted((s for s in settings if s.codec == name), key=lambda s: s.ratio):
            still = _still((n for n in one.needles if _length(n) in lengths), fair)
            if still is not None:
                points.append(CurvePoint(one.ratio, still))
        if points:
            found.append(Curve(name, points))
    return found
