"""Passkeys in haystacks: where they stand, and when an answer counts as found."""

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import Words
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.kept import Kept
from kvferry.codec.lab.coding import Coder, GroupSource, group_codecs
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.needles.ask import ask
from kvferry.codec.lab.needles.haystack import (
    NAMES,
    Needle,
    Question,
    make_haystack,
    question,
)
from kvferry.codec.lab.needles.measure import kept_share, measure, read
from kvferry.codec.mlx.adapters import snapshot
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError
from kvferry.proto.keys import SINK_TOKENS, WINDOW_TOKENS

FILLER = [1 + i % 90 for i in range(3000)]
MODEL_ID = bytes(32)
DEPTHS = st.lists(st.floats(0, 1), min_size=1, max_size=len(NAMES), unique=True)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(900, 1500), depths=DEPTHS, seed=st.integers(0, 99))
def test_a_needle_is_never_in_what_is_kept_exact(
    length: int, depths: list[float], seed: int
) -> None:
    found = make_haystack(Words(), FILLER, length, depths, seed)
    assert len(found.tokens) == length
    assert sorted(n.depth for n in found.needles) == sorted(depths)
    for needle in found.needles:
        start, end = needle.span
        assert SINK_TOKENS <= start < end <= length - WINDOW_TOKENS == found.coded
        assert list(found.tokens[start:end]) == Words().encode(needle.sentence)
    spans = [needle.span for needle in found.needles]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert len({n.key for n in found.needles}) == len({n.name for n in found.needles}) == len(spans)


def test_depths_reach_from_the_first_place_to_the_last() -> None:
    first = make_haystack(Words(), FILLER, 1000, [0.0], 5)
    last = make_haystack(Words(), FILLER, 1000, [1.0], 5)
    assert last.needles[0].span[1] == last.coded
    task = Words().encode(
        "Somewhere in the following text the pass keys of some gates are given.\n\n"
    )
    assert list(first.tokens[first.needles[0].span[0] - len(task) :][: len(task)]) == task


def test_same_seed_same_haystack_and_another_seed_another_key() -> None:
    one, two, three = (make_haystack(Words(), FILLER, 1000, [0.5], s) for s in (1, 1, 2))
    assert one == two
    assert one.needles[0].key != three.needles[0].key


@pytest.mark.parametrize(
    ("length", "depths"), [(150, [0.5]), (5000, [0.5]), (1000, []), (1000, [1.5])]
)
def test_what_cannot_be_built_is_refused(length: int, depths: list[float]) -> None:
    with pytest.raises(ConfigError):
        make_haystack(Words(), FILLER, length, depths, 0)


def test_question_and_answer_are_the_tokens_of_the_whole_sentence() -> None:
    found = make_haystack(Words(), FILLER, 1000, [0.2, 0.8], 3)
    asked = question(Words(), found, found.needles[1])
    name, key = asked.needle.name, asked.needle.key
    whole = f"\n\nWhat is the pass key of the {name} gate?"
    begun = f"The pass key of the {name} gate is"
    expected = [*Words().encode(whole), *found.asked, *Words().encode(f"{begun} {key}")]
    assert [*asked.asked, *asked.answer] == expected
    assert list(asked.answer) == Words().encode(f" {key}")


def greedy(tiny: LoadedModel, context: list[int], asked: list[int], count: int) -> list[int]:
    cache, found = make_prompt_cache(tiny.model), []
    prefill(tiny.model, context, cache)
    given = asked
    for _ in range(count):
        said = int(mx.argmax(tiny.model(mx.array([given]), cache=cache)[0, -1]).item())
        found.append(said)
        given = [said]
    return found


def test_exact_means_what_the_model_says_greedily(tiny: LoadedModel) -> None:
    context, asked = FILLER[:60], [5, 6, 7]
    own = greedy(tiny, context, asked, 4)
    needle = Needle("willow", "1", 0.0, (0, 1))
    for answer, right in ((own[:3], True), ([own[0], (own[1] + 1) % 97, own[2]], False)):
        cache = make_prompt_cache(tiny.model)
        prefill(tiny.model, context, cache)
        found = ask(tiny.model, tiny.tokenizer, cache, Question(needle, asked, answer))
        goes_on = chr(own[3]).isdigit()
        assert found.exact is (right and not goes_on)
        assert found.tokens == 3
        assert found.log_prob < 0


class Letters(Words):
    """Whatever is said is a letter."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "a" * len(tokens)


class Digits(Words):
    """Whatever is said is a digit."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "1" * len(tokens)


def test_a_key_that_goes_on_with_a_digit_is_another_key(tiny: LoadedModel) -> None:
    context, asked = FILLER[:60], [5, 6, 7]
    right = Question(Needle("willow", "1", 0.0, (0, 1)), asked, greedy(tiny, context, asked, 3))
    exact = []
    for tokenizer in (Letters(), Digits()):
        cache = make_prompt_cache(tiny.model)
        prefill(tiny.model, context, cache)
        exact.append(ask(tiny.model, tokenizer, cache, right).exact)
    assert exact == [True, False]


def test_every_needle_is_asked_for_after_a_cache_of_its_own(tiny: LoadedModel) -> None:
    haystack = make_haystack(Words(), FILLER, 900, [0.1, 0.9], 0)
    cache = make_prompt_cache(tiny.model)
    prefill(tiny.model, haystack.tokens, cache)
    shape = describe(tiny.model, tiny.config)
    ready = read(Words(), MODEL_ID, shape, haystack, snapshot(cache, 900))
    exact = measure(tiny, ready, ready.exact())
    assert [r.depth for r in exact] == [0.1, 0.9]
    assert all(r.ratio == 1 and r.alone == 1 and r.needles == 2 for r in exact)
    again = measure(tiny, ready, ready.exact())
    assert [r.found for r in again] == [r.found for r in exact]

    def through(name: str, options: dict[str, object]) -> list[float]:
        codecs = group_codecs(name, options, [(0, 3)])
        coded = Coder(MODEL_ID, codecs, GroupSource(), 2).run(ready.snapshot, (0, haystack.coded))
        return [r.found.log_prob for r in measure(tiny, ready, coded)]

    own = [r.found.log_prob for r in exact]

    def away(found: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(found, own, strict=True))

    # The window is at 8 bits whatever the codec; the model's own cache is exact throughout.
    assert 0 < away(through("raw", {})) < away(through("affine", {"bits": 2})) / 2


def test_an_entry_that_stands_for_several_tokens_is_none_of_them() -> None:
    # Of tokens 0 to 7: 0 and 5 alone, 1 to 3 at their mean, 4, 6 and 7 at theirs, padding.
    positions = np.array([[[0, 2, 5, 6, 6]]], np.int64)
    weights = np.array([[[1, 3, 1, 3, 0]]], np.float32)
    data = np.zeros((1, 1, 5, 4), np.float32)
    streams = {name: Stream(name, data, DType.FLOAT32) for name in "kv"}
    for own, share in ((weights, 0.25), (None, 0.5)):
        page = PageTensors((0, 1), (0, 1), (0, 8), streams, kept=Kept(positions, own))
        assert kept_share([page], (0, 8)) == share
        assert kept_share([page], (1, 4)) == (0.0 if own is not None else pytest.approx(1 / 3))
