"""Blobs as damage and strangers make them, for the tests of every codec."""

from collections.abc import Iterator

from kvferry.proto import container
from kvferry.proto.container import SectionData


def damaged(data: bytes, flips: int = 8) -> Iterator[bytes]:
    """Cut off at every byte, and with ``flips`` bits of each byte flipped one by one."""
    for position in range(len(data)):
        yield data[:position]
        for bit in range(position, position + flips):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit % 8
            yield bytes(flipped)


def section_lies(data: bytes, *contents: bytes) -> Iterator[bytes]:
    """Behind good checksums one section has other bytes, length or name, or is gone.

    ``contents``: more that each section's bytes are exchanged for.
    """
    blob = container.parse(data)
    sections = list(blob.sections.values())
    for index, old in enumerate(sections):
        whole, size = bytes(old.data), old.raw_length
        for changed in (
            *[SectionData(old.name, c, size) for c in (b"", whole[:-1], whole + b"\0", *contents)],
            *[SectionData(old.name, whole, length) for length in (size + 1, 0, 1 << 29)],
            SectionData(old.name + "x", whole, size),
        ):
            forged = [*sections[:index], changed, *sections[index + 1 :]]
            yield container.pack(blob.header, forged)
        yield container.pack(blob.header, [*sections[:index], *sections[index + 1 :]])
