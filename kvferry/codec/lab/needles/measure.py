"""One haystack, read once; then every codec on the same cache, and every question."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.lab.coding import Coded, Coder, GroupSource, group_codecs
from kvferry.codec.lab.evaluate import TAIL_CODEC
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.needles.ask import Found, ask
from kvferry.codec.lab.needles.haystack import Haystack, Question, question
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.mlx.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """One needle, found or not.

    Attributes:
        length: tokens of the haystack, the exact window included.
        depth: see `Needle`.
        needles: how many there were in the haystack.
        ratio: fp16 bytes of what the codec coded over the bytes shipped for it.
        alone: share of the needle's entries that the codec neither dropped nor merged. Results
            of before had ``kept``, which counted some that were merged.
    """

    length: int
    depth: float
    needles: int
    name: str
    key: str
    ratio: float
    alone: float
    found: Found

    def to_json(self) -> dict[str, object]:
        """Flat, for a result's JSON."""
        fields = asdict(self)
        answer: dict[str, object] = fields.pop("found")
        return fields | answer


@dataclass(frozen=True, slots=True, eq=False)
class ReadHaystack:
    """A haystack with the exact cache that the model made of it.

    Attributes:
        snapshot: of all its tokens.
        tail: its window as it would be stored, whatever the codec.
    """

    haystack: Haystack
    questions: Sequence[Question]
    snapshot: CacheSnapshot
    tail: Coded

    def exact(self) -> Coded:
        """The cache as it was, its window too, in place of what codecs make of it; of ratio 1."""
        page = self.snapshot.page(self.snapshot.layers, (0, self.snapshot.tokens))
        return Coded([page], page.raw_bytes_fp16 // 2, page.raw_bytes_fp16, 0.0, 0.0)


def read(
    tokenizer: Tokenizer,
    model_id: bytes,
    shape: ModelShape,
    haystack: Haystack,
    snapshot: CacheSnapshot,
) -> ReadHaystack:
    """What is the same for all codecs.

    Args:
        snapshot: of the haystack's tokens, all of them.
    """
    codecs = group_codecs(*TAIL_CODEC, [(0, shape.layers)])
    coder = Coder(model_id, codecs, GroupSource(), shape.kv_heads, kind="tail")
    tail = coder.run(snapshot, (haystack.coded, len(haystack.tokens)))
    asked = [question(tokenizer, haystack, needle) for needle in haystack.needles]
    return ReadHaystack(haystack, asked, snapshot, tail)


def measure(
    loaded: LoadedModel, ready: ReadHaystack, coded: Coded, done: Done | None = None
) -> list[NeedleResult]:
    """Every question of a haystack, each after a restored cache of its own.

    Args:
        coded: all but the window through a codec, or `ReadHaystack.exact`.
        done: called with numbers of tokens run.
    Raises: ModelError.
    """
    haystack, ratio = ready.haystack, 2 * coded.values / coded.blob_bytes
    whole = coded.pages[-1].tokens[1] == ready.snapshot.tokens
    pages = coded.pages if whole else [*coded.pages, *ready.tail.pages]
    results = []
    for one in ready.questions:
        cache = make_prompt_cache(loaded.model)
        ready.snapshot.refill(cache, pages)
        found = ask(loaded.model, loaded.tokenizer, cache, one)
        if done is not None:
            done(len(one.asked) + len(one.answer))
        needle = one.needle
        results.append(
            NeedleResult(
                length=len(haystack.tokens),
                depth=needle.depth,
                needles=len(haystack.needles),
                name=needle.name,
                key=needle.key,
                ratio=ratio,
                alone=kept_share(coded.pages, needle.span),
                found=found,
            )
        )
    return results


def kept_share(pages: Sequence[PageTensors], span: tuple[int, int]) -> float:
    """How much of some positions the pages still have, over all layers and heads.

    Only an entry that stands for one token is that token: of several it is at their mean
    position, which may well be a position of the span.
    """
    shares = []
    for page in pages:
        wanted = np.arange(max(span[0], page.tokens[0]), min(span[1], page.tokens[1]))
        if page.kept is None:
            shares.append(np.full(wanted.size, 1.0))
            continue
        held, weights = page.kept.positions, page.kept.weights
        own = held if weights is None else np.where(weights == 1, held, -1)
        rows = own.reshape(-1, own.shape[-1])
        shares.append(np.mean([np.isin(wanted, row) for row in rows], axis=0))
    found = np.concatenate(shares)
    return float(found.mean()) if found.size else 0.0
