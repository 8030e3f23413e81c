"""What codecs share that keep some tokens exactly and forget the others.

Sections: ``<stream>/<codec>``, the kept tokens bit for bit (float32 as float16 where it fits,
see `kvferry.codec.sinks`), and ``kept/tokens``, which they are.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import Encoded, PageTensors, Positions, Stream, Wanted
from kvferry.codec.kept_sections import TOKENS, pack_kept, read_kept
from kvferry.codec.sinks import check_sinks, pack_sinks, read_sinks
from kvferry.errors import ConfigError, CorruptBlobError
from kvferry.proto.container import SectionData

PLACES = ("contiguous", "original")
MAX_SINKS = 1 << 16
MAX_RATIO = 1e6


def positions_in(page: PageTensors) -> Positions:
    """Of each entry of a page that may lack tokens already, (entries,)."""
    return np.arange(*page.tokens, dtype=np.int64) if page.kept is None else page.kept.positions


def encode_entries(codec: str, page: PageTensors, entries: Positions, positions: str) -> Encoded:
    """Keep ``entries``, rising indices; ``codec`` names its sections. Raises: as `take`."""
    kept = page.take(entries, contiguous=positions == PLACES[0])
    assert kept.kept is not None  # noqa: S101
    sections = pack_kept(kept.kept, page.tokens)
    for name, stream in sorted(kept.streams.items()):
        sections.append(pack_sinks(f"{name}/{codec}", stream, kept.entries))
    return Encoded(sections, entries=kept.entries)


def decode_entries(codec: str, wanted: Wanted, sections: Mapping[str, SectionData]) -> PageTensors:
    """What `encode_entries` wrote. Raises: CorruptBlobError."""
    sec.check_names(sections, [TOKENS, *(f"{name}/{codec}" for name in wanted.shapes)])
    place = wanted.params.get("positions")
    if place not in PLACES:
        raise CorruptBlobError("codec parameters", f"positions are none of {', '.join(PLACES)}")
    kept = read_kept(wanted, sections, contiguous=place == PLACES[0])
    streams, layers = {}, sec.layer_slice(wanted)
    for name, shape in wanted.shapes.items():
        section, dtype = sections[f"{name}/{codec}"], wanted.dtypes[name]
        check_sinks(section, int(np.prod(shape, dtype=np.int64)), dtype)
        streams[name] = Stream(name, read_sinks(section, shape, dtype)[layers], dtype)
    return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams, kept)


def check_params(wanted: Wanted, always: Iterable[str], either: Iterable[str]) -> None:
    """All of ``always`` and one of ``either``. Raises: CorruptBlobError."""
    found, names = set(wanted.params), set(always)
    if not (names < found and len(found - names) == 1 and found - names <= set(either)):
        raise CorruptBlobError("codec parameters", f"are {sorted(found)}")


def place_option(options: Mapping[str, object]) -> str:
    """``positions``. Raises: ConfigError."""
    place = options.get("positions", PLACES[0])
    if place not in PLACES:
        raise ConfigError("positions", place, " or ".join(PLACES))
    return str(place)


def ratio_option(value: object) -> float:
    """Tokens for each that is kept. Raises: ConfigError."""
    return opts.number_within("ratio", value, 1, MAX_RATIO)


def sinks_option(options: Mapping[str, object], default: int) -> int:
    """``sinks``. Raises: ConfigError."""
    return opts.whole_within("sinks", options.get("sinks", default), 0, MAX_SINKS)


def check_common(ratio: float, sinks: int, positions: str) -> None:
    """What dropping codecs have in common. Raises: ConfigError."""
    ratio_option(ratio)
    sinks_option({"sinks": sinks}, 0)
    place_option({"positions": positions})


def only_one(options: Mapping[str, object], names: tuple[str, str]) -> None:
    """Raises: ConfigError: both are given."""
    if set(names) <= set(options):
        raise ConfigError(names[0], options[names[0]], f"left out beside {names[1]}")
