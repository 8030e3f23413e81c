"""One rank that runs all layers of any mlx-lm model: alone, or a part of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.errors import ModelError

PREFILL_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Whole:
    """A model that computes the same logits on every rank; see `Stage` for the calls."""

    model: Any
    last: bool = True

    @classmethod
    def divided(cls, model: Any, group: Any | None) -> Self:
        """Heads and hidden units divided among the ranks of ``group``, in place.

        Raises: ModelError: mlx-lm cannot divide this model.
        """
        if group is not None:
            if not hasattr(model, "shard"):
                raise ModelError(f"mlx-lm cannot run {type(model).__module__} on several ranks")
            model.shard(group)
            mx.eval(model.parameters())
        return cls(model)

    def make_cache(self) -> list[Any]:
        """Empty caches of all layers."""
        return list(make_prompt_cache(self.model))

    def forward(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Logits (1, tokens, vocabulary)."""
        logits: mx.array = self.model(mx.array([list(tokens)]), cache=cache)
        mx.eval(logits)
        return logits

    def share_token(self, logits: mx.array | None) -> int:
        """The most likely next token of the last position."""
        if logits is None:
            raise ModelError("no logits")
        return int(np.array(mx.argmax(logits[0, -1])))

    def prefill(
        self, tokens: Sequence[int], cache: list[Any], chunk: int = PREFILL_CHUNK
    ) -> mx.array:
        """All of ``tokens``, ``chunk`` at a time; logits (1, 1, vocabulary) of the last."""
        for start in range(0, len(tokens), chunk):
            logits = self.forward(tokens[start : start + chunk], cache)
        return logits[:, -1:]
