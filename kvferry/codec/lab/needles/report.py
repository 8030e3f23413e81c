"""What needles say of a model and of codecs, as Markdown and a picture."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import measured, newest, table
from kvferry.codec.lab.needles.compared import Compared, Setting, compared, length
from kvferry.codec.lab.needles.places import Needle, Place, by_setting, kept, placed
from kvferry.codec.lab.needles.plot import Curve, CurvePoint, Part, draw_recall
from kvferry.codec.lab.needles.summary import mean, nats, number, recall, shown

EXACT = "raw"
PICTURE = "needles.png"
# Below this the model fails without any codec, and says nothing about one.
FAIR = 0.5


def section(results: Sequence[Result], folder: Path) -> list[str]:
    """Uncompressed recall, then each codec's, and their curves."""
    own = measured(newest(results))
    exact = placed([result for result in own if result.run.codec.name == EXACT])
    lines = _uncompressed(list(exact.values()))
    settings = _settings([result for result in own if result.run.codec.name != EXACT])
    if not settings:
        return [*lines, "No codec was measured."]
    found = compared(settings)
    lines += _codecs(settings, found, exact)
    parts = [part for one in found if (part := _part(one, exact)) is not None]
    if not parts:
        return lines
    told = f"{own[-1].about.get('model')}; of the needles that it finds with its own cache"
    draw_recall(parts, told, folder / PICTURE)
    return [*lines, f"![Recall against compression]({PICTURE})"]


def _uncompressed(exact: Sequence[Needle]) -> list[str]:
    if not exact:
        return ["Not measured without compression: nothing can be said of codecs.", ""]
    depths = sorted({number(n, "depth") for n in exact if n["needles"] == 1})
    lengths = sorted({length(n) for n in exact})
    rows, weak = [], []
    for size in lengths:
        own = [n for n in exact if length(n) == size]
        single = [n for n in own if n["needles"] == 1]
        cells = [_counted(n for n in single if number(n, "depth") == d) for d in depths]
        cells += [shown(recall(single)), shown(recall(n for n in own if n["needles"] != 1))]
        rows.append([f"{size:,}", *cells])
        found = recall(own)
        if found is not None and found.share < FAIR:
            weak.append(f"{size:,}")
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


def _settings(results: Sequence[Result]) -> list[Setting]:
    found = [
        Setting(own[0].run.codec.shown, described, placed(own))
        for described, own in by_setting(results).items()
    ]
    return sorted((one for one in found if one.needles), key=lambda s: (s.codec, _ratio(s)))


def _codecs(
    settings: Sequence[Setting], found: Sequence[Compared], exact: Mapping[Place, Needle]
) -> list[str]:
    lines = [
        'Codecs: exact matches, one needle by length and by depth. "Still found" counts only '
        "those that the model finds with its own cache. The key's log-probability, less what it "
        "is with that cache for the same needles, shows what exact matches are too coarse for.",
        "",
    ]
    for one in found:
        lines += _table(one, exact)
    shown_ones = {setting.described for one in found for setting in one.settings}
    left = [setting for setting in settings if setting.described not in shown_ones]
    if left:
        lines += ["Measured on other needles only: " + "; ".join(map(_told, left)) + ".", ""]
    return lines


def _table(one: Compared, exact: Mapping[Place, Needle]) -> list[str]:
    places = one.places
    several = [place for place in places if one.settings[0].needles[place]["needles"] != 1]
    single = [place for place in places if place not in set(several)]
    by_length = _grouped(one, single, lambda needle: length(needle))
    by_depth = _grouped(one, single, lambda needle: number(needle, "depth"))
    paired = [place for place in places if place in exact]
    fair = [place for place in paired if bool(exact[place]["exact"])]
    rows = []
    for setting in one.settings:
        own = setting.needles
        cells = [setting.described, f"{_ratio(setting, places):.1f}"]
        cells += [_counted(own[p] for p in group) for group in by_length.values()]
        cells += [
            " ".join(_counted(own[p] for p in group) for group in by_depth.values()),
            _counted(own[p] for p in several),
            shown(recall(own[p] for p in fair)),
        ]
        lost = [nats(own[p]) - nats(exact[p]) for p in paired]
        alone = [share for p in places if (share := kept(own[p])) is not None]
        cells.append(f"{mean(lost):+.3f}" if lost else "-")
        rows.append([*cells, f"{100 * mean(alone):.0f} %" if len(alone) == len(places) else "-"])
    head = ["codec", "ratio", *(f"{n:,}" for n in by_length), "far to near", "several"]
    head += ["still found", "key, nats per token less", "needle's tokens kept"]
    about = f"On the same {_where(one)}, {len(fair)} of which the model finds with its own cache:"
    return [about, "", *table(head, rows), ""]


def _grouped(
    one: Compared, places: Sequence[Place], by: Callable[[Needle], float]
) -> dict[float, list[Place]]:
    """Places by a number of their needles, rising."""
    found: dict[float, list[Place]] = {}
    for place in places:
        found.setdefault(by(one.settings[0].needles[place]), []).append(place)
    return dict(sorted(found.items()))


def _where(one: Compared) -> str:
    count = len(one.places)
    return f"{count} needle{'s' if count > 1 else ''} at {_joined(one.lengths)} tokens"


def _told(setting: Setting) -> str:
    own = list(setting.needles.values())
    lengths = _joined(sorted({length(needle) for needle in own}))
    return f"{setting.described} ({_ratio(setting):.1f}x, {_counted(own)} at {lengths} tokens)"


def _ratio(setting: Setting, places: Sequence[Place] | None = None) -> float:
    own = setting.needles
    return mean([number(own[place], "ratio") for place in (own if places is None else places)])


def _joined(lengths: Sequence[int]) -> str:
    *first, last = [f"{n:,}" for n in lengths]
    return f"{', '.join(first)} and {last}" if first else last


def _part(one: Compared, exact: Mapping[Place, Needle]) -> Part | None:
    """Of the picture; None where the model finds nothing by itself."""
    places = [place for place in one.places if place in exact and bool(exact[place]["exact"])]
    base = recall(exact[place] for place in places)
    if base is None:
        return None
    curves: dict[str, list[CurvePoint]] = {}
    for setting in one.settings:
        still = recall(setting.needles[place] for place in places)
        if still is not None:
            point = CurvePoint(_ratio(setting, places), still)
            curves.setdefault(setting.codec, []).append(point)
    told = f"{len(places)} of {_where(one)}"
    return Part(told, [Curve(name, points) for name, points in curves.items()], base)
