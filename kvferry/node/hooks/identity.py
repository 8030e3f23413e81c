"""Ranks exchange the digests of the layers they hold, and arrive at one model id."""

from dataclasses import replace

from blake3 import blake3

from kvferry.errors import ModelError
from kvferry.node.hooks.group import Group
from kvferry.proto.identity import ModelFingerprint, merge, model_id
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
    if len({table[:DIGEST_BYTES] for table in tables}) > 1:
        raise ModelError(
            "ranks hold different models (config or adapter differ): "
            "load the same model on every machine"
        )
    return merge([_from_table(table, mine) for table in tables])


def agreed_model_id(group: Group, mine: ModelFingerprint | None, layer_count: int) -> bytes | None:
    """`exchange`, then `model_id`. Raises: ModelError, on every rank alike."""
    whole = exchange(group, mine, layer_count)
    return None if whole is None else model_id(whole)


def _to_table(mine: ModelFingerprint | None, layer_count: int) -> bytes:
    """Digests in a fixed order and size, as a collective needs them; zeros: not known."""
    if mine is None:
        return bytes((2 + len(SHARED_NAMES) + 2 * layer_count) * DIGEST_BYTES)
    config = blake3(canonical_json(dict(mine.config)) + mine.adapter).digest()
    shared = (mine.shared.get(name, _ABSENT) for name in SHARED_NAMES)
    layers = (mine.layers.get(i, _ABSENT) for i in range(layer_count))
    ropes = (mine.rope.get(i, _ABSENT) for i in range(layer_count))
    return b"".join([config, mine.tokenizer, *shared, *layers, *ropes])


def _from_table(table: bytes, mine: ModelFingerprint) -> ModelFingerprint:
    """Another rank's fingerprint; its config is known to be the same as ours."""
    cells = [table[at : at + DIGEST_BYTES] for at in range(0, len(table), DIGEST_BYTES)]
    shared = dict(zip(SHARED_NAMES, cells[2:], strict=False))
    numbered = cells[2 + len(SHARED_NAMES) :]
    layers = dict(enumerate(numbered[: mine.layer_count]))
    ropes = dict(enumerate(numbered[mine.layer_count :]))
    return replace(
        mine,
        tokenizer=cells[1],
        shared={name: digest for name, digest in shared.items() if digest != _ABSENT},
        layers={i: digest for i, digest in layers.items() if digest != _ABSENT},
        rope={i: digest for i, digest in ropes.items() if digest != _ABSENT},
    )
