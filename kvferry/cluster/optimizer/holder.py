"""What is known of a node that holds a part of a model: its links, and how fast it decodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.cluster.optimizer.ladder import Floats, Ladder

Range = tuple[int, int]
# Of links that nobody has measured, and where no other is known either.
GUESSED_BYTES_PER_S = 100e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node, and its part of a model.

    Attributes:
        parts: (layers, heads), absolute, half-open; no two of them overlap.
        bytes_per_s, latency_s: between it and the store; 0 bytes: not measured.
        decode_tokens_per_s: for its part of the model, however it is coded; 0: not measured.
        prefill_tokens_per_s: of all that hold the model with it; 0: not measured.
        decode_values_per_s: codec -> rate, of those that were measured one by one.
        nearer: (name, bytes per second) of other places that may have its part: its own
            tiers ("itself"), nodes that hold the same layers.
    """

    node_id: str
    parts: tuple[tuple[Range, Range], ...]
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_values_per_s: tuple[tuple[str, float], ...] = ()
    nearer: tuple[tuple[str, float], ...] = ()


def links_of(holders: Sequence[Holder]) -> Floats:
    """(nodes,) bytes per second; a link that is not measured is as the others' median."""
    known = [holder.bytes_per_s for holder in holders if holder.bytes_per_s > 0]
    guess = float(np.median(known)) if known else GUESSED_BYTES_PER_S
    return np.array([holder.bytes_per_s or guess for holder in holders])


def decoding(
    ladder: Ladder, holders: Sequence[Holder], held: Floats
) -> tuple[Floats, Floats, Floats]:
    """Seconds that decoding takes a value: whatever the codec, beyond that, at most.

    A codec that a node has not measured by itself takes there what all of them take
    together, or what it takes the others, by their median.

    Args:
        held: (nodes,) values of a token that each holds.
    Returns:
        (nodes,); (nodes, choices), empty where no node knows one codec from another; (nodes,).
    """
    codecs = sorted({choice.codec for choice in ladder.choices})
    known = np.full((len(holders), len(codecs)), np.nan)
    for row, holder, values in zip(known, holders, held, strict=True):
        if holder.decode_tokens_per_s > 0 and values > 0:
            row[:] = 1 / (holder.decode_tokens_per_s * values)
        for name, rate in holder.decode_values_per_s:
            if name in codecs and rate > 0:
                row[codecs.index(name)] = 1 / rate
    usual = [float(np.median(c[c == c])) if (c == c).any() else 0.0 for c in known.T]
    each = np.where(np.isnan(known), usual, known)
    common = each.min(axis=1)
    beyond = each - common[:, None]
    if not beyond.any():
        return common, np.zeros((0, 0)), common
    column = [codecs.index(choice.codec) for choice in ladder.choices]
    return common, beyond[:, column], each.max(axis=1)
