"""One rank of a pipeline: some consecutive layers of a llama-like mlx-lm model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from kvferry.errors import ModelError

PREFILL_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers ``layers`` (absolute, half-open) of ``model``, on one rank.

    Rank 0 embeds, the last rank has norm and head; hidden states go from rank to rank
    with point-to-point sends, and the last rank's token reaches all with a sum.
    """

    model: Any
    layers: tuple[int, int]
    group: Any | None = None

    def __post_init__(self) -> None:
        inner = getattr(self.model, "model", None)
        if not all(hasattr(inner, name) for name in ("embed_tokens", "layers", "norm")):
            raise ModelError(
                f"{type(self.model).__name__} is no llama-like model: the small pipeline "
                "needs model.embed_tokens, model.layers and model.norm"
            )

    @property
    def rank(self) -> int:
        """Place in the pipeline."""
        return 0 if self.group is None else int(self.group.rank())

    @property
    def last(self) -> bool:
        """Whether this rank computes logits."""
        return self.group is None or self.rank == self.group.size() - 1

    def make_cache(self) -> list[KVCache]:
        """Empty caches of the local layers, as exo's ``make_kv_cache`` gives them."""
        return [KVCache() for _ in range(*self.layers)]  # type: ignore[no-untyped-call]

    def forward(self, tokens: Sequence[int], cache: list[Any]) -> mx.array | None:
        """Run ``tokens`` through the local layers, appending to ``cache``.

        Returns: logits (1, tokens, vocabulary) on the last rank, None on the others.
        """
        hidden = self._run(tokens, cache)
        return self._logits(hidden) if self.last else None

    def _run(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Hidden states after the local layers; passed on unless this is the last rank."""
        hidden = self._receive(tokens)
        mask = create_attention_mask(hidden, cache[0])
        held = self.model.model.layers[self.layers[0] : self.layers[1]]
        for layer, layer_cache in zip(held, cache, strict=True):
            hidden = layer(hidden, mask, cache=layer_cache)
        if not self.last:
            hidden = mx.distributed.send(hidden, self.rank + 1, group=self.group)
        mx.eval(hidden)
        return hidden

    def _receive(self, tokens: Sequence[int]) -> mx.array:
        if self.rank == 0:
            embedded: mx.array = self.model.model.embed_tokens(mx.array([list(tokens)]))
            return embedded
        like = mx.zeros((1, len(tokens), self.model.args.hidden_size), dtype=mx.float32)
        return mx.distributed.recv_like(like, self.rank - 1, group=self.group)

    def _logits(self, hidden: mx.array) -> mx.array:
        hidden = self.model.model.norm(hidden)
        tied = self.model.args.tie_word_embeddings
        head = self.model.model.embed_tokens.as_linear if tied else self.model.lm_head
        logits: mx.array = head(hidden)
        return logits

    def share_token(self, logits: mx.array | None) -> int:
        """The most likely next token of the last position, the same on every rank."""
        mine = mx.zeros((1,), dtype=mx.int32)
        if logits is not None:
            mine = mx.argmax(logits[0, -1:], axis=-1).astype(mx.int32)
        if self.group is not None:
            mine = mx.distributed.all_sum(mine, group=self.group)
        return int(np.array(mine)[0])

    def prefill(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        chunk: int = PREFILL_CHUNK,
    ) -> mx.array | None:
        """All of ``tokens``, ``chunk`` at a time.

        Returns: logits (1, 1, vocabulary) of the last position on the last rank, else None.
        """
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            hidden = self._run(part, cache)
            mx.eval([c.keys for c in cache], [c.values for c in cache])
        # The head is a fifth of this model's work: only the last position needs it.
        return self._logits(hidden[:, -1:]) if self.last else None
