"""Why a page of a prompt is not there to be restored, in words for people."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from kvferry.cluster.coverage import covers
from kvferry.cluster.repository import BlobInfo
from kvferry.codec.registry import reader, restorable
from kvferry.errors import CodecError

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Gap:
    """Why a page cannot be used.

    Attributes:
        state: "missing", "incomplete", "other_codec", "lacks_tokens", "unreadable"; or
            "behind_gap" for one that is whole, "in_tail" for one whose tokens are in a tail
            within reach.
        why: a sentence without its full stop.
    """

    state: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is known beside the page.

    Attributes:
        model_id, root: what the prompt's keys are made from.
        accept: codecs that the policy takes; empty: any.
        policy: its name.
        holders: node -> layers of this model that it holds, as it told the coordinator.
        of_model: page blobs of this model, some of them if there are many.
        others: model id -> how many page blobs of other models were seen.
    """

    model_id: bytes
    root: bytes
    accept: Collection[str] = ()
    policy: str = ""
    holders: Mapping[str, Sequence[Range]]
    of_model: Callable[[], Sequence[BlobInfo]]
    others: Callable[[], Mapping[bytes, int]]


def gap_of(index: int, previous: bytes, held: Sequence[BlobInfo], around: Surroundings) -> Gap:
    """Why page ``index`` does not count.

    Args:
        previous: key of the page before it, or the root.
        held: blobs that there are of it.
    """
    if not held:
        return Gap("missing", _not_stored(index, previous, around))
    whole = [b for b in held if restorable(b.key.codec_name)]
    if not whole:
        names = ", ".join(sorted({b.key.codec_name for b in held}))
        return Gap("lacks_tokens", f"it is stored as {names}, which drops tokens: never put back")
    held = whole
    taken = [b for b in held if not around.accept or b.key.codec_name in around.accept]
    names = ", ".join(sorted({b.key.codec_name for b in held}))
    if not taken:
        accepted = ", ".join(sorted(around.accept))
        return Gap(
            "other_codec",
            f"it is stored as {names}, and policy {around.policy!r} accepts {accepted} only",
        )
    unknown = {str(problem) for b in taken if (problem := _unreadable(b)) is not None}
    if unknown:
        return Gap("unreadable", "; ".join(sorted(unknown)))
    if _covered(taken):
        return Gap("behind_gap", "it is whole, but what comes before it is not")
    if _covered(held):
        rest = sorted({b.key.codec_name for b in held} - {b.key.codec_name for b in taken})
        return Gap(
            "other_codec",
            f"{_missing(taken, around)}: these are stored as {', '.join(rest)}, which policy "
            f"{around.policy!r} does not accept",
        )
    return Gap("incomplete", _missing(taken, around))


def missing_layers(held: Sequence[BlobInfo]) -> list[Range]:
    """Layers of the model, half-open, that blobs do not cover with all heads."""
    layers, heads = held[0].model_layers, held[0].model_heads
    gaps: list[Range] = []
    for layer in range(layers):
        parts = [((0, 1), b.heads) for b in held if b.layers[0] <= layer < b.layers[1]]
        if covers(parts, 1, heads):
            continue
        if gaps and gaps[-1][1] == layer:
            gaps[-1] = (gaps[-1][0], layer + 1)
        else:
            gaps.append((layer, layer + 1))
    return gaps


def layers_text(ranges: Sequence[Range]) -> str:
    """Half-open ranges as people count: ``layers 0-14 and 20``."""
    parts = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in ranges]
    return ("layer " if parts and len(parts) == 1 and "-" not in parts[0] else "layers ") + (
        " and ".join(parts) or "none"
    )


def _covered(held: Sequence[BlobInfo]) -> bool:
    parts = [(b.layers, b.heads) for b in held]
    return covers(parts, held[0].model_layers, held[0].model_heads)


def _missing(held: Sequence[BlobInfo], around: Surroundings) -> str:
    gaps = missing_layers(held)
    text = f"{layers_text(gaps)} of {held[0].model_layers} are missing"
    names = [
        node
        for node, ranges in sorted(around.holders.items())
        if any(a < gap[1] and gap[0] < b for a, b in ranges for gap in gaps)
    ]
    return f"{text} ({', '.join(names)} has these layers)" if names else text


def _unreadable(info: BlobInfo) -> CodecError | None:
    try:
        reader(info.codec.name, info.codec.version)
    except CodecError as exc:
        return exc
    return None


def _not_stored(index: int, previous: bytes, around: Surroundings) -> str:
    known = around.of_model()
    if not known:
        others = around.others()
        if not others:
            return "not stored: nothing is, of any model"
        models = ", ".join(f"{model.hex()[:16]} ({n:,} blobs)" for model, n in others.items())
        return (
            f"nothing of this model id ({around.model_id.hex()[:16]}) is stored, but of {models}: "
            "other weights, tokenizer, config, adapter or kind of cache make another id"
        )
    if index:
        beside = {b.key.page_key for b in known if b.previous_key == previous}
        if beside:
            pages = "a page" if len(beside) == 1 else f"{len(beside)} pages"
            return f"not stored: what is stored goes on here with other tokens ({pages})"
        return "not stored, nor any other page that goes on from the one before"
    roots = Counter(b.previous_key for b in known if b.tokens[0] == 0)
    if roots and around.root not in roots:
        return (
            f"this model's pages ({len(known):,} blobs seen) lie in another namespace than this "
            "node's, or have another length: keys start from another root"
        )
    return "not stored: the prompts of this model that are stored begin with other tokens"
