"""Ranks exchange the digests of the layers they hold, and arrive at one model id."""

from dataclasses import replace

from blake3 import blake3

from kvferry.errors import ModelError
from kvferry.node.hooks.group import Group
from kvferry.proto.identity import ModelFingerprint, model_id
from kvferry.proto.keys import DIGEST_BYTES, canonical_json

SHARED_NAMES = ("embedding", "norm", "head")
_ABSENT = bytes(DIGEST_BYTES)


def exchange(
    group: Group, mine: ModelFingerprint | None, layer_count: int
) -> ModelFingerprint | None:
    """Merge all ranks' fingerprints. A collective: every rank calls it, ready or not.

    Args:
        mine: digests of this rank's layers; None while they are still being computed.
        layer_count: layers of the whole model.
    Returns:
        The whole fingerprint, the same on every rank; None until all ranks are ready.
    Raises:
        ModelError: ranks hold different configs, tokenizers or adapters, or different
            weights for one layer. Raised on every rank alike.
    """
    tables = group.all_gather(_to_table(mine, layer_count))
    if mine is None or any(not any(table) for table in tables):
        return None
    common = {table[: 2 * DIGEST_BYTES] for table in tables}
    if len(common) > 1:
        raise ModelError(
            "ranks hold different models (config, tokenizer or adapter differ): "
            "load the same model on every machine"
        )
    cells = _merge(tables)
    shared = dict(zip(SHARED_NAMES, cells[: len(SHARED_NAMES)], strict=True))
    layers = cells[len(SHARED_NAMES) :: 2]
    ropes = cells[len(SHARED_NAMES) + 1 :: 2]
    return replace(
        mine,
        shared={name: digest for name, digest in shared.items() if digest != _ABSENT},
        layers={i: digest for i, digest in enumerate(layers) if digest != _ABSENT},
        rope={i: digest for i, digest in enumerate(ropes) if digest != _ABSENT},
    )


def agreed_model_id(group: Group, mine: ModelFingerprint | None, layer_count: int) -> bytes | None:
    """`exchange`, then `model_id`. Raises: ModelError, on every rank alike."""
    whole = exchange(group, mine, layer_count)
    return None if whole is None else model_id(whole)


def _to_table(mine: ModelFingerprint | None, layer_count: int) -> bytes:
    cells = 2 + len(SHARED_NAMES) + 2 * layer_count
    if mine is None:
        return bytes(cells * DIGEST_BYTES)
    config = blake3(canonical_json(dict(mine.config)) + mine.adapter).digest()
    parts = [config, mine.tokenizer, *(mine.shared.get(name, _ABSENT) for name in SHARED_NAMES)]
    for layer in range(layer_count):
        parts += [mine.layers.get(layer, _ABSENT), mine.rope.get(layer, _ABSENT)]
    return b"".join(parts)


def _merge(tables: list[bytes]) -> list[bytes]:
    """Cell by cell, the one digest that a rank has; two different ones are an error."""
    merged: list[bytes] = []
    for at in range(2 * DIGEST_BYTES, len(tables[0]), DIGEST_BYTES):
        known = {table[at : at + DIGEST_BYTES] for table in tables} - {_ABSENT}
        if len(known) > 1:
            raise ModelError("ranks hold different weights for the same layer of the model")
        merged.append(known.pop() if known else _ABSENT)
    return merged
