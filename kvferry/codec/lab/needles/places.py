"""Needles of several results, told apart by where they stood."""

from collections.abc import Mapping, Sequence

from kvferry.codec.lab.experiment.results import Result

Needle = Mapping[str, object]
Place = tuple[object, ...]

# Of these ``kept`` counted entries at the mean position of several tokens as one of them.
_MERGE = ("centroid",)
_TOLD_APART_BY = ("length", "seed", "depth", "needles", "key")


def placed(results: Sequence[Result]) -> dict[Place, Needle]:
    """Those of results that can be read, with their seed; one that two files ask for once.

    Args:
        results: of one codec at one setting, the newest last.
    Raises: KeyError: a needle that says too little.
    """
    found: dict[Place, Needle] = {}
    for result in results:
        listed = result.metrics.get("needles")
        seed = result.run.settings.get("seed")
        for needle in listed if isinstance(listed, Sequence) else ():
            if isinstance(needle, Mapping):
                own = {"alone": _before(result, needle), **needle, "seed": seed}
                found[result.run.text, *(own[key] for key in _TOLD_APART_BY)] = own
    return found


def kept(needle: Needle) -> float | None:
    """Share of its entries that are still its own, as `placed` has it; None: not known."""
    found = needle.get("alone")
    return None if found is None else float(str(found))


def by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each codec as it was asked for."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.run.codec.described(), []).append(result)
    return found


def _before(result: Result, needle: Needle) -> object:
    return None if result.run.codec.name in _MERGE else needle.get("kept")
