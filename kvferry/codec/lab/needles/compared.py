"""Settings side by side on the very same needles.

Not every setting is asked for every haystack, and long ones are hard: a mean over whichever
needles a setting happened to get says more of those than of the setting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.lab.needles.places import Needle, Place
from kvferry.codec.lab.needles.summary import number


@dataclass(frozen=True, slots=True)
class Setting:
    """A codec as it was asked for, over all lengths and seeds."""

    codec: str
    described: str
    needles: Mapping[Place, Needle]


@dataclass(frozen=True, slots=True)
class Compared:
    """Settings, and needles that all of them were asked for."""

    settings: Sequence[Setting]
    places: Sequence[Place]

    @property
    def lengths(self) -> list[int]:
        """Of the haystacks, rising."""
        own = self.settings[0].needles
        return sorted({length(own[place]) for place in self.places})

    def has(self, other: "Compared") -> bool:
        """Whether it has all settings of another."""
        mine = {setting.described for setting in self.settings}
        return mine >= {setting.described for setting in other.settings}


def compared(settings: Sequence[Setting]) -> list[Compared]:
    """First the widest comparison, settings times needles; then, where it leaves settings
    out, that at the length which most of all settings share.

    Args: settings: each with a needle at least.
    """
    if not settings:
        return []
    widest = max(_candidates(settings), key=lambda c: len(c.settings) * len(c.places))
    lengths = sorted({length(n) for one in settings for n in one.needles.values()})
    at_one = [found for n in lengths for found in _candidates(settings, n)]
    shared = max(at_one, key=lambda c: (len(c.settings), len(c.places)))
    return [widest] if widest.has(shared) else [widest, shared]


def length(needle: Needle) -> int:
    """Of its haystack, in tokens."""
    return int(number(needle, "length"))


def _candidates(settings: Sequence[Setting], at: int | None = None) -> list[Compared]:
    """For every set of settings that share a needle: all needles that they share."""
    held: dict[Place, frozenset[int]] = {}
    for index, one in enumerate(settings):
        for place, needle in one.needles.items():
            if at in (None, length(needle)):
                held[place] = held.get(place, frozenset()) | {index}
    return [
        Compared(
            [settings[index] for index in sorted(chosen)],
            [place for place, own in held.items() if own >= chosen],
        )
        for chosen in dict.fromkeys(held.values())
    ]
