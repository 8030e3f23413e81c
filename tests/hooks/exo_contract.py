"""As much of exo as a hook meets: modules of the same names with the same calls.

What exo 0.3.70 does with its entries is kept: deep copies in and out, caches of all but
the last two tokens of a prompt, prefixes compared token by token, snapshots of states that
cannot be trimmed. `test_hooks_exo_real.py` compares it with exo's own source where there is
one.
"""

import copy
import hashlib
import logging
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache

_MEMORY_THRESHOLD = 0.85
CHUNK = 256


class MediaRegion:
    def __init__(self, content_hash: str, start_pos: int, end_pos: int) -> None:
        self.content_hash, self.start_pos, self.end_pos = content_hash, start_pos, end_pos


def _find_media_regions(
    prompt_tokens: mx.array, images: list[str], image_token_id: int
) -> list[MediaRegion]:
    regions: list[MediaRegion] = []
    for position, token in enumerate(prompt_tokens.tolist()):
        if token != image_token_id:
            continue
        if regions and regions[-1].end_pos == position:
            regions[-1].end_pos += 1
        else:
            regions.append(MediaRegion("", position, position + 1))
    for region, image in zip(regions, images, strict=False):
        # As exo's: of pixels alone, whatever their width.
        pixels = image.partition(":")[2]
        region.content_hash = hashlib.sha256(pixels.encode()).hexdigest()
    return regions


class VisionProcessor:
    def __init__(self, weights_repo: str, image_token_id: int) -> None:
        self.vision_config = SimpleNamespace(
            model_type="fake", weights_repo=weights_repo, image_token_id=image_token_id
        )

    def process(self, images: list[str], prompt: list[int]) -> list[MediaRegion]:
        return _find_media_regions(mx.array(prompt), images, self.vision_config.image_token_id)


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
        self._media_regions: list[list[MediaRegion]] = []
        self._group = group
        self.used = 0.5

    def clear(self) -> None:
        for entries in self._all():
            entries.clear()

    def _all(self) -> list[list[Any]]:
        return [
            self.prompts,
            self.caches,
            self._snapshots,
            self._media_regions,
            self.prefill_tps,
        ]

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
        self._media_regions.append(media_regions or [])
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
        self._media_regions[index] = media_regions or []
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
            same = self._validate_media_match(same, self._media_regions[index], media_regions)
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

    @staticmethod
    def _validate_media_match(same: int, known: list[MediaRegion], asked: Any) -> int:
        by_start = {region.start_pos: region for region in asked or []}
        for region in known:
            other = by_start.get(region.start_pos)
            if region.start_pos >= same:
                break
            if other is not None and other.content_hash != region.content_hash:
                return region.start_pos
        return same

    def _evict_if_needed(self) -> None:
        while self.caches and self.get_memory_used_percentage() > _MEMORY_THRESHOLD:
            for entries in self._all():
                entries.pop(0)

    def get_memory_used_percentage(self) -> float:
        used = self.used if self.caches else 0.0
        if self._group is None:
            return used
        everyone = mx.distributed.all_gather(mx.array([used]), group=self._group)
        return float(mx.max(everyone).item())


def mx_barrier(group: Any) -> None:
    if group is not None:
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))


def load_mlx_items(bound_instance: Any, group: Any, given: Any) -> Generator[Any, None, Any]:
    return (yield from shard_and_load(bound_instance.bound_shard, group, given))


def shard_and_load(shard_metadata: Any, group: Any, given: Any) -> Generator[Any, None, Any]:
    yield "half"
    mx_barrier(group)
    return given


class MlxBuilder:
    """Loads what its test gives it; builds what serves prompts."""

    def __init__(
        self, model: Any, tokenizer: Any, group: Any = None, vision_processor: Any = None
    ) -> None:
        self.given = (model, tokenizer)
        self.vision_processor = vision_processor
        self.inference_model: Any = None
        self.tokenizer: Any = None
        self.group = group

    def load(self, bound_instance: Any) -> Generator[Any]:
        self.inference_model, self.tokenizer = yield from load_mlx_items(
            bound_instance, self.group, self.given
        )

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
            try:
                self._save(tokens, list(cache), snapshots, hit, index, media_regions)
            except Exception:
                logging.getLogger(__name__).warning("Failed to save prefix cache")
        else:
            assert self.kv_prefix_cache.prefill_tps[index] >= 0
        last = tokens[cache_length(cache) or len(prompt) - 2 :]
        logits = self.model(last[None], cache=cache)[0, -1]
        mx.eval(logits)
        return logits, hit

    def _save(
        self, tokens: mx.array, cache: Any, snapshots: Any, hit: int, index: Any, media: Any
    ) -> None:
        if index is not None:
            self.kv_prefix_cache.update_kv_cache(
                index, tokens, cache, snapshots, hit, media_regions=media
            )
        else:
            self.kv_prefix_cache.add_kv_cache(
                tokens, cache, snapshots, media_regions=media, prefill_tps=9.0
            )


def shard(folder: Path, layers: int) -> Any:
    """What `BoundInstance.bound_shard` tells of one machine alone."""
    card = SimpleNamespace(model_id=str(folder))
    found = SimpleNamespace(
        model_card=card, start_layer=0, end_layer=layers, device_rank=0, world_size=1
    )
    return SimpleNamespace(bound_shard=found, is_image_model=False)


def build_model_path(model_id: str) -> Path:
    return Path(model_id)
