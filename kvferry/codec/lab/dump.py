"""A live cache as a file that other tools read: safetensors, or NPZ."""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.lab.forward import logits, prefill
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.codec.rope import RopeSpec, positions_of, undo
from kvferry.errors import ConfigError, ModelError

SUFFIXES = (".safetensors", ".npz")
Report = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Dump:
    """A cache as the hook sees it.

    Attributes:
        model: as it was asked for.
        page: all layers, heads and tokens.
        tokens: those that the cache holds, in order.
        prompt_tokens: how many of them were given; the rest was generated.
        rope_applied: whether keys are rotated, as they are in the cache.
        cache_dtype: of the live cache.
        model_layers: which layer of the model each layer of the page is.
    """

    model: str
    model_id: bytes
    page: PageTensors
    tokens: Sequence[int]
    prompt_tokens: int
    rope_applied: bool
    cache_dtype: DType
    model_layers: Sequence[int]

    def metadata(self) -> dict[str, str]:
        """What goes into the file, and what ``--json`` shows of it."""
        first = next(iter(self.page.streams.values())).data.shape
        return {
            "model": self.model,
            "model_id": self.model_id.hex(),
            "tokens": str(len(self.tokens)),
            "prompt_tokens": str(self.prompt_tokens),
            "rope_applied": "yes" if self.rope_applied else "no",
            "dtype": self.cache_dtype.value,
            "layers": str(first[0]),
            "model_layers": ",".join(str(layer) for layer in self.model_layers),
            "heads": str(first[1]),
            "layout": "layers, 1, heads, tokens, dim",
        }


def dump(
    loaded: LoadedModel,
    model_id: bytes,
    prompt: Sequence[int],
    generate: int,
    *,
    undo_rope: bool,
    report: Report,
) -> Dump:
    """Prefill, generate greedily, and take the cache.

    Every token that was generated is in the cache too; an end token ends it early.

    Args:
        prompt: at least one token.
        undo_rope: keys as they were before rotation, in float32.
        report: called with tokens run so far and what is being done.
    Raises: ModelError: a cache that is not supported; ConfigError: no prompt.
    """
    if not prompt or generate < 0:
        raise ConfigError("prompt", f"{len(prompt)} tokens", "at least one token of text")
    shape = describe(loaded.model, loaded.config)  # refuses what cannot be stored, by name
    cache = make_prompt_cache(loaded.model)
    tokens = list(prompt)
    reached = 0

    def done(count: int) -> None:
        nonlocal reached
        reached += count
        report(reached, "prefill" if reached < len(prompt) else "generating")

    if len(prompt) > 1:
        prefill(loaded.model, prompt[:-1], cache, done)
    scores = logits(loaded.model, prompt[-1:], cache)
    done(1)
    for _ in range(generate):
        chosen = int(np.array(mx.argmax(scores[-1])))
        if chosen in loaded.tokenizer.eos_token_ids:
            break
        tokens.append(chosen)
        scores = logits(loaded.model, [chosen], cache)
        done(1)
    if not shape.layers:
        raise ModelError(f"{loaded.name} keeps no rows of tokens: there is nothing to dump")
    snapshot = adapters.snapshot(cache, len(tokens), latent=shape.latent)
    page = snapshot.page(snapshot.layers, (0, len(tokens)))
    dtype = next(iter(page.streams.values())).dtype
    if undo_rope:
        page = _unrotated(page, stream_ropes(loaded.model, shape))
    return Dump(
        loaded.name,
        model_id,
        page,
        tokens,
        len(prompt),
        not undo_rope,
        dtype,
        shape.page_layers,
    )


def _unrotated(page: PageTensors, ropes: Mapping[str, Sequence[RopeSpec]]) -> PageTensors:
    positions = positions_of(page.tokens)
    made = dict(page.streams)
    for name, specs in ropes.items():
        keys = page.streams[name].float32()
        for index, spec in enumerate(specs):
            keys[index] = undo(keys[index], spec, positions)
        made[name] = Stream(name, keys, DType.FLOAT32)
    return PageTensors(page.layers, page.heads, page.tokens, made)


def stored_dtypes(found: Dump, path: Path) -> Mapping[str, str]:
    """Stream -> element type in the file: numpy, and so NPZ, has no bfloat16."""
    wide = path.suffix.lower() == ".npz"
    return {
        name: DType.FLOAT32.value if wide and stream.dtype is DType.BFLOAT16 else stream.dtype.value
        for name, stream in found.page.streams.items()
    }


def save(found: Dump, path: Path) -> int:
    """Write ``path``; never half of it. Returns: its bytes.

    NPZ: per stream (``k`` and ``v``, or MLA's ``latent`` and ``rope_key``) an array
    (layers, 1, heads, tokens, dim), ``tokens`` int64, and ``metadata``, a JSON text.
    safetensors: the same arrays, metadata in its header.

    Raises: ConfigError: another suffix than `SUFFIXES`, or it cannot be written.
    """
    write = {".npz": _save_npz, ".safetensors": _save_safetensors}.get(path.suffix.lower())
    if write is None:
        raise ConfigError("--out", str(path), f"a file that ends in {' or '.join(SUFFIXES)}")
    try:
        handle, name = tempfile.mkstemp(prefix=".dump.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(found, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path.stat().st_size
    except OSError as exc:
        raise ConfigError("--out", str(path), f"a file to write ({exc.strerror or exc})") from exc


def _save_npz(found: Dump, path: Path) -> None:
    metadata = {**found.metadata(), "stored_dtypes": stored_dtypes(found, path)}
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": np.asarray(found.tokens, dtype=np.int64),
        "metadata": np.array(json.dumps(metadata)),
    }
    with zipfile.ZipFile(path, "w") as archive:  # as np.savez, but one array at a time
        for name, stream in found.page.streams.items():
            data = stream.float32() if stream.dtype is DType.BFLOAT16 else stream.data
            _add(archive, name, data[:, None])
        for name, array in arrays.items():
            _add(archive, name, array)


def _add(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)


def _save_safetensors(found: Dump, path: Path) -> None:
    tensors = {"tokens": mx.array(np.asarray(found.tokens, dtype=np.int64))}
    for name, stream in found.page.streams.items():
        made = mx.array(stream.data[:, None])
        tensors[name] = made.view(mx.bfloat16) if stream.dtype is DType.BFLOAT16 else made
    metadata = found.metadata() | {"stored_dtypes": json.dumps(dict(stored_dtypes(found, path)))}
    mx.save_safetensors(str(path), tensors, metadata)
