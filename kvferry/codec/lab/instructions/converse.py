"""A conversation with its cache carried from turn to turn, and what became of it in between.

The model reads every token; only then is its memory made smaller. That is another thing
than leaving out text, which the model would never have read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.lab.chat_frame import ChatFrame, plain
from kvferry.codec.lab.forward import Done, prefill
from kvferry.codec.lab.instructions.examples import Example
from kvferry.codec.lab.instructions.memory import Memory
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.weighted_attention import attention_for

DEFAULT_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Answered:
    """How one conversation ended.

    Attributes:
        answer: to its test, cut at ``DEFAULT_ANSWER_TOKENS`` or wherever it ended.
        share: see `Memory`.
        tokens: read before the test.
    """

    name: str
    kind: str
    answer: str
    right: bool
    share: float
    tokens: int

    def to_json(self) -> dict[str, object]:
        """For a result's JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "right": self.right,
            "share": self.share,
            "tokens": self.tokens,
            "answer": self.answer,
        }


def converse(
    loaded: LoadedModel,
    frame: ChatFrame,
    example: Example,
    memory: Memory,
    *,
    limit: int = DEFAULT_ANSWER_TOKENS,
    done: Done | None = None,
    begin: Callable[[Sequence[int]], list[Any]] | None = None,
) -> Answered:
    """All turns of an example, then its test.

    Args:
        memory: asked after each turn, the test's excepted.
        limit: tokens of the answer, at most.
        done: called with numbers of tokens run.
        begin: a cache of the first turn's tokens, which are the same whatever the memory.
    Raises: FerryError of ``memory``; ModelError.
    """
    turns = turn_tokens(loaded, frame, example)
    cache: list[Any] = make_prompt_cache(loaded.model) if begin is None else begin(turns[0])
    seen = 0
    for index, turn in enumerate(turns[:-1]):
        if index or begin is None:
            with attention_for(loaded.model, cache):
                prefill(loaded.model, turn, cache, done)
        seen += len(turn)
        cache = memory.after_turn(cache, seen)
    answer = say(loaded, cache, turns[-1], limit, done)
    text = loaded.tokenizer.decode(answer)
    return Answered(example.name, example.kind, text, example.right(text), memory.share, seen)


def turn_tokens(loaded: LoadedModel, frame: ChatFrame, example: Example) -> list[list[int]]:
    """Tokens of each turn, the test last; together the conversation as the template has it."""
    tokenizer = loaded.tokenizer
    found = []
    before = frame.opening
    for turn in example.turns:
        user, answer = plain(tokenizer, turn.user), plain(tokenizer, turn.assistant)
        found.append([*before, *user, *frame.asked, *answer])
        before = frame.answered
    return [*found, [*before, *plain(tokenizer, example.test), *frame.asked]]


def say(
    loaded: LoadedModel,
    cache: list[Any],
    tokens: Sequence[int],
    limit: int,
    done: Done | None = None,
) -> list[int]:
    """Feed ``tokens``, then the likeliest tokens up to the answer's end.

    Returns: without the token that ends it.
    """
    model: Any = loaded.model
    report: Callable[[int], None] = done or (lambda _: None)
    given, found = list(tokens), list[int]()
    while len(found) < limit:
        with attention_for(model, cache):
            scores = model(mx.array([given]), cache=cache)[0, -1]
        report(len(given))
        said = int(np.array(mx.argmax(scores)))
        if said in loaded.tokenizer.eos_token_ids:
            break
        found.append(said)
        given = [said]
    return found
