"""What codecs share when they read sections: names, lengths, integers in parameters."""

from collections.abc import Iterable, Mapping

from kvferry.codec.base import Wanted
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData


def check_names(sections: Mapping[str, SectionData], wanted: Iterable[str]) -> None:
    """Exactly the sections that the codec writes. Raises: CorruptBlobError."""
    names = set(wanted)
    if set(sections) != names:
        odd = sorted(names ^ set(sections))[0]
        state = "is missing" if odd in names else "is unknown"
        raise CorruptBlobError(f"section {odd!r}", state)


def check_raw(section: SectionData, raw_length: int) -> None:
    """The length after decoding must be what shapes say. Raises: CorruptBlobError."""
    if section.raw_length != raw_length:
        raise CorruptBlobError(
            f"section {section.name!r}",
            f"decodes to {section.raw_length:,} bytes, {raw_length:,} wanted",
        )


def integer(wanted: Wanted, name: str, low: int, high: int) -> int:
    """A whole number among the codec's parameters. Raises: CorruptBlobError."""
    value = wanted.params.get(name)
    if type(value) is not int or not low <= value <= high:
        raise CorruptBlobError("codec parameters", f"{name!r} is not from {low} to {high}")
    return value


def check_params(wanted: Wanted, names: Iterable[str]) -> None:
    """Exactly the parameters that the codec writes. Raises: CorruptBlobError."""
    if set(wanted.params) != set(names):
        raise CorruptBlobError("codec parameters", f"are {sorted(wanted.params)}")


def layer_slice(wanted: Wanted) -> slice:
    """The wanted layers within the blob's."""
    return slice(wanted.cut[0] - wanted.layers[0], wanted.cut[1] - wanted.layers[0])
