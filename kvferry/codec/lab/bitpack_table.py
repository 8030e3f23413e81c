"""The table that seed 001 asks of ``bitpack``, on a live model."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.bitpack import BITS
from kvferry.codec.bitpack_direct import BitPackedKVCache
from kvferry.codec.lab.bitpack_targets import targets
from kvferry.codec.lab.compare import compare
from kvferry.codec.lab.forward import Done, logits, prefill
from kvferry.codec.lab.machine import load_average, machine
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.bitpack_cache import make_bitpack_cache
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError, ModelError
from kvferry.proto.keys import SINK_TOKENS

GENERATED = 100
PAGE_SIZE_KB = 32


def work(prompt: int, continuation: int, generated: int = GENERATED) -> int:
    """Tokens that `measure` runs through the model."""
    return (1 + len(BITS)) * (prompt + generated) + (1 + len(BITS)) * continuation


def measure(
    loaded: LoadedModel,
    tokens: Sequence[int],
    prompt: int,
    *,
    generated: int = GENERATED,
    done: Done | None = None,
) -> dict[str, Any]:
    """Plain cache against live packed ones of 6 and 8 bits.

    Args:
        tokens: a prompt, a continuation of it to measure perplexity on, and one more.
        prompt: how many tokens the prompt has.
        generated: tokens to generate greedily after the prompt.
        done: called with numbers of tokens run, `work` of them in all.
    Returns: ``rows`` (one for each number of bits), ``memory``, ``targets`` (the seed's
        own beside what was measured), and what it was measured on.
    Raises: ModelError: the model's cache is not all rows of keys and values.
    """
    continuation = len(tokens) - prompt - 1
    if prompt <= SINK_TOKENS or continuation < 1 or generated < 1:
        raise ConfigError("tokens", len(tokens), "a prompt, a continuation and one more")
    model: Any = loaded.model
    caches = [make_prompt_cache(model), *(make_bitpack_cache(model, bits) for bits in BITS)]
    if any(type(layer).__name__ != "KVCache" for layer in caches[0]):
        raise ModelError("bench bitpack takes models whose caches are rows of keys and values")
    for cache in caches:
        prefill(model, tokens[:prompt], cache, done)
    exact = adapters.snapshot(caches[0], prompt)
    values = _values_of(caches[0])
    start = int(tokens[prompt])
    runs = _generate(model, [copy.deepcopy(c) for c in caches], start, generated, done)
    found = compare(model, caches[0], caches[1:], tokens[prompt:])
    if done is not None:
        done((1 + len(BITS)) * continuation)
    rows = []
    for bits, run, compared in zip(BITS, runs[1:], found, strict=True):
        same = [a == b for a, b in zip(runs[0].tokens, run.tokens, strict=True)]
        rows.append(
            {
                "bits": bits,
                "token_match": sum(same) / generated,
                "first_difference": same.index(False) if False in same else None,
                "top1_agreement": compared.top1_agreement,
                "kl_mean": compared.kl_mean,
                "ppl_delta_pct": compared.ppl_delta_pct,
                **_errors(exact, bits),
                "unpack_ms_per_token": run.unpack_ms,
                "step_ms": run.step_ms,
                "share_pct": 100 * run.unpack_ms / run.step_ms,
                "overhead_pct": 100 * (run.step_ms / runs[0].step_ms - 1),
                "finite": run.finite,
                "cache_bytes": run.cache_bytes,
                "bits_per_value": 8 * run.cache_bytes / (values * (prompt + generated)),
            }
        )
    memory = _memory(loaded, values * (prompt + generated), runs)
    return {
        "model": loaded.name,
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "continuation_tokens": continuation,
        "ppl_plain": found[0].ppl_exact,
        "step_ms_plain": runs[0].step_ms,
        "rows": rows,
        "memory": memory,
        "targets": targets(rows, memory),
        "load_average": load_average(),
        "machine": machine(),
    }


class _Run:
    """One greedy generation, step by step beside the others."""

    def __init__(self, model: Any, cache: list[Any], token: int) -> None:
        self._model, self.cache, self._next = model, cache, token
        self.tokens: list[int] = []
        self.finite = True
        self._steps: list[float] = []
        self.unpack_ms, self.cache_bytes = 0.0, 0

    def step(self) -> None:
        started = time.perf_counter()
        scores = logits(self._model, [self._next], self.cache)
        self._steps.append(time.perf_counter() - started)
        self.finite = self.finite and bool(mx.isfinite(scores).all())
        self._next = int(mx.argmax(scores[-1]))
        self.tokens.append(self._next)

    def finish(self) -> None:
        """What the cache takes now, and what unpacking all of it takes once."""
        self.cache_bytes = sum(layer.nbytes for layer in self.cache)
        self.unpack_ms = 1000 * _median(
            lambda: mx.eval([layer.keys_and_values() for layer in self.cache])
        )

    @property
    def step_ms(self) -> float:
        """A token of the generation, median."""
        return 1000 * statistics.median(self._steps)


def _generate(
    model: Any, caches: Sequence[list[Any]], token: int, count: int, done: Done | None
) -> list[_Run]:
    """In turn, token by token, so that whatever else the machine does slows all of them."""
    runs = [_Run(model, cache, token) for cache in caches]
    for _ in range(count):
        for run in runs:
            run.step()
        if done is not None:
            done(len(runs))
    for run in runs:
        run.finish()
    return runs


def _errors(exact: adapters.CacheSnapshot, bits: int) -> dict[str, float]:
    """Mean error over mean magnitude of K and of V behind the first tokens, and the time
    of both directions, of the whole prompt."""
    page = exact.page(exact.layers, (SINK_TOKENS, exact.tokens))
    k, v = (page.streams[name].float32() for name in ("k", "v"))
    direct = BitPackedKVCache(bits, PAGE_SIZE_KB)
    packed = direct.compress_kv(k, v)
    found = {}
    for name, before, after in zip("kv", (k, v), direct.decompress_kv(*packed), strict=True):
        error = np.abs(after - before).mean(axis=(1, 2, 3), dtype=np.float64)
        size = np.abs(before).mean(axis=(1, 2, 3), dtype=np.float64)
        found[f"{name}_error_pct"] = float(100 * error.mean() / size.mean())
        found[f"{name}_error_worst_layer_pct"] = float(100 * (error / size).max())
    tokens = page.tokens[1] - page.tokens[0]
    encode = 1000 * _median(lambda: direct.compress_kv(k, v))
    decode = 1000 * _median(lambda: direct.decompress_kv(*packed))
    return found | {
        "compress_ms": encode,
        "decompress_ms": decode,
        "compress_ms_per_token": encode / tokens,
        "page_bits_per_value": 8 * sum(p.nbytes for p in packed) / (k.size + v.size),
    }


def _values_of(cache: Sequence[Any]) -> int:
    """Numbers that a token adds to a plain cache."""
    return sum(a.shape[1] * a.shape[3] for layer in cache for a in layer.state[:2])


def _memory(loaded: LoadedModel, values: int, runs: Sequence[_Run]) -> dict[str, Any]:
    """Bytes of weights and cache at the end of the generation.

    The quantized weights are those of the model's files; where this machine holds them
    dequantized, that is what another would hold.
    """
    weights: Any = tree_flatten(loaded.model.parameters())
    numbers = sum(a.size for _, a in weights)
    files = sum(path.stat().st_size for path in loaded.weight_files) or None
    plain = runs[0].cache[0].state[0].itemsize * values
    return {
        "weights_fp32": 4 * numbers,
        "weights_in_files": files,
        "cache_plain": plain,
        "cache_fp16": 2 * values,
        "cache_packed": {str(b): run.cache_bytes for b, run in zip(BITS, runs[1:], strict=True)},
    }


def _median(action: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
