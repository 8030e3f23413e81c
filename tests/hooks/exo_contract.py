"""As much of exo as a hook meets: modules of the same names with the same calls.

What exo 0.3.70 does with its entries is kept: deep copies in and out, caches of all but
the last two tokens of a prompt, prefixes compared token by token, snapshots of states that
cannot be trimmed. `test_hooks_exo_real.py` compares it with exo's own source where there is
one.
"""

import copy
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache

_MEMORY_THRESHOLD = 0.85
CHUNK = 256


class CacheSnapshot:
    def __init__(self, states: list[Any], token_count: int) -> None:
        self.states, self.token_count = states, token_count


def snapshot_ssm_states(cache: list[Any]) -> CacheSnapshot:
    states = [
        copy.deepcopy(c) if isinstance(c, ArraysCache | RotatingKVCache) else None for c in cache
    ]
    return CacheSnapshot(states, cache_length(cache))


def cache_length(cache: list[Any]) -> int:
    return max((int(getattr(c, "offset", 0)) for c in cache), default=0)


def make_kv_cache(model: Any, max_kv_size: int | None = None, keep: int = 0) -> list[Any]:
    return list(make_prompt_cache(model))


class KVPrefixCache:
    def __init__(self, group: Any) -> None:
        self.prompts: list[mx.array] = []
        self.caches: list[list[Any]] = []
        self._snapshots: list[list[CacheSnapshot] | None] = []
        self.prefill_tps: list[float] = []
        self._group = group
        self.used = 0.5

    def clear(self) -> None:
        for entries in (self.prompts, self.caches, self._snapshots, self.prefill_tps):
            entries.clear()

    def add_kv_cache(
        self,
        prompt_tokens: mx.array,
        cache: list[Any],
        ssm_snapshots: list[CacheSnapshot] | None = None,
        media_regions: Any = None,
        prefill_tps: float = 0.0,
    ) -> None:
        self._evict_if_needed()
        self.prompts.append(prompt_tokens)
        self.caches.append(copy.deepcopy(cache))
        self._snapshots.append(ssm_snapshots)
        self.prefill_tps.append(prefill_tps)

    def update_kv_cache(
        self,
        index: int,
        prompt_tokens: mx.array,
        cache: list[Any],
        snapshots: list[CacheSnapshot] | None,
        restore_pos: int,
        media_regions: Any = None,
        prefill_tps: float = 0.0,
    ) -> None:
        kept = [s for s in self._snapshots[index] or [] if s.token_count <= restore_pos]
        self.prompts[index] = prompt_tokens
        self.caches[index] = copy.deepcopy(cache)
        self._snapshots[index] = [*kept, *(snapshots or [])] or None
        self.prefill_tps[index] = prefill_tps

    def get_kv_cache(
        self, model: Any, prompt_tokens: mx.array, media_regions: Any = None
    ) -> tuple[list[Any], mx.array, int | None, bool]:
        best, length = None, 0
        for index, known in enumerate(self.prompts):
            same = 0
            for a, b in zip(prompt_tokens.tolist(), known.tolist(), strict=False):
                if a != b:
                    break
                same += 1
            if same > length:
                best, length = index, same
        if best is None:
            return make_kv_cache(model), prompt_tokens, None, False
        exact = length >= len(prompt_tokens) - 1
        cache = copy.deepcopy(self.caches[best])
        held = cache_length(cache)
        states = [i for i, c in enumerate(cache) if isinstance(c, ArraysCache | RotatingKVCache)]
        target = min(held, len(prompt_tokens) - 1 if exact else length)
        if states:
            fitting = [s for s in self._snapshots[best] or [] if s.token_count <= length]
            if not fitting:
                return make_kv_cache(model), prompt_tokens, None, False
            nearest = max(fitting, key=lambda s: s.token_count)
            target = nearest.token_count
            for i in states:
                cache[i] = copy.deepcopy(nearest.states[i])
        for c in cache:
            if not isinstance(c, ArraysCache | RotatingKVCache):
                c.trim(held - target)
        return cache, prompt_tokens[target:], best, exact

    def _evict_if_needed(self) -> None:
        while self.caches and self.get_memory_used_percentage() > _MEMORY_THRESHOLD:
            for entries in (self.prompts, self.caches, self._snapshots, self.prefill_tps):
                entries.pop(0)  # type: ignore[attr-defined]

    def get_memory_used_percentage(self) -> float:
        return self.used if self.caches else 0.0


class MlxBuilder:
    """Loads what its test gives it; builds what serves prompts."""

    def __init__(self, model: Any, tokenizer: Any, group: Any = None) -> None:
        self.given = (model, tokenizer)
        self.inference_model: Any = None
        self.tokenizer: Any = None
        self.group = group

    def load(self, bound_instance: Any) -> Generator[Any]:
        yield "half"
        self.inference_model, self.tokenizer = self.given

    def build(self) -> "Engine":
        assert self.inference_model
        return Engine(self.inference_model, KVPrefixCache(self.group))


class Engine:
    """Serves a prompt as `ExoBatchGenerator.submit` does."""

    def __init__(self, model: Any, kv_prefix_cache: Any) -> None:
        self.model, self.kv_prefix_cache = model, kv_prefix_cache

    def submit(self, prompt: list[int], media_regions: Any = None) -> tuple[mx.array, int]:
        """(logits of the next token, tokens that were cached)."""
        tokens = mx.array(prompt)
        cache, remaining, index, exact = self.kv_prefix_cache.get_kv_cache(
            self.model, tokens, media_regions
        )
        hit = len(prompt) - len(remaining)
        snapshots = []
        if not exact:
            todo = remaining.tolist()[:-2]
            for start in range(0, len(todo), CHUNK):
                mx.eval(self.model(mx.array([todo[start : start + CHUNK]]), cache=cache))
                snapshots.append(snapshot_ssm_states(cache))
            if index is not None:
                self.kv_prefix_cache.update_kv_cache(
                    index, tokens, list(cache), snapshots, hit, media_regions=media_regions
                )
            else:
                self.kv_prefix_cache.add_kv_cache(
                    tokens, list(cache), snapshots, media_regions=media_regions, prefill_tps=9.0
                )
        else:
            assert self.kv_prefix_cache.prefill_tps[index] >= 0
        last = tokens[cache_length(cache) or len(prompt) - 2 :]
        logits = self.model(last[None], cache=cache)[0, -1]
        mx.eval(logits)
        return logits, hit


def shard(folder: Path, layers: int) -> Any:
    """What `BoundInstance.bound_shard` tells of one machine alone."""
    card = SimpleNamespace(model_id=str(folder))
    found = SimpleNamespace(
        model_card=card, start_layer=0, end_layer=layers, device_rank=0, world_size=1
    )
    return SimpleNamespace(bound_shard=found, is_image_model=False)


def build_model_path(model_id: str) -> Path:
    return Path(model_id)
