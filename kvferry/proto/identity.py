"""What a model is: the digest that keeps one model's pages from another's.

Each machine of a cluster digests the layers it holds; the digests are exchanged and
every rank arrives at the same `model_id` whatever the split. No file is read here:
`kvferry.codec.mlx.weights` computes the digests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from blake3 import blake3

from kvferry.errors import ModelError
from kvferry.proto.keys import DIGEST_BYTES, canonical_json

CACHE_LAYOUT_VERSION = 1
_DOMAIN = b"kvferry/model/1"
_Key = TypeVar("_Key", int, str)
# What hubs and converters write into a config without changing a single number.
VOLATILE = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "architectures", "torch_dtype",
     "dtype", "use_cache", "_commit_hash", "_attn_implementation", "auto_map", "eos_token_id",
     "bos_token_id", "pad_token_id"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """Digests of all that changes what a cache holds. All digests are 32 bytes.

    Attributes:
        config: canonical config, as a JSON-like mapping (paths and names left out).
        layers: absolute layer index -> digest of its weights. May be part of the model.
        layer_count: layers of the whole model.
        shared: name -> digest of embedding, norm and head.
        tokenizer: digest of the tokenizer.
        rope: absolute layer index -> rope fingerprint. Same indices as ``layers``.
        adapter: digest of adapter weights; empty where there are none.
    """

    config: Mapping[str, object]
    layers: Mapping[int, bytes]
    layer_count: int
    shared: Mapping[str, bytes]
    tokenizer: bytes
    rope: Mapping[int, bytes]
    adapter: bytes = b""

    @property
    def complete(self) -> bool:
        """Whether every layer's digest is known."""
        wanted = set(range(self.layer_count))
        return set(self.layers) == wanted and set(self.rope) == wanted


def model_id(fingerprint: ModelFingerprint) -> bytes:
    """32 bytes that stand for the model in every key.

    Raises:
        ModelError: digests of some layers are missing (exchange them first), or a
            digest has another size than 32 bytes.
    """
    if not fingerprint.complete:
        wanted = set(range(fingerprint.layer_count))
        odd = sorted((wanted ^ set(fingerprint.layers)) | (wanted ^ set(fingerprint.rope)))
        raise ModelError(
            f"model id is not known yet: digests of layers {odd[:8]} are missing or too many; "
            "every rank must exchange its own first"
        )
    parts = [*fingerprint.layers.values(), *fingerprint.rope.values(), fingerprint.tokenizer]
    parts += fingerprint.shared.values()
    if any(len(part) != DIGEST_BYTES for part in parts):
        raise ModelError("a digest of the model has another size than 32 bytes")
    try:
        return blake3(_DOMAIN + _content(fingerprint)).digest()
    except (TypeError, ValueError) as exc:
        raise ModelError(f"the model's config is no plain JSON: {exc}") from exc


def _content(fingerprint: ModelFingerprint) -> bytes:
    return canonical_json(
        {
            "cache_layout": CACHE_LAYOUT_VERSION,
            "config": dict(fingerprint.config),
            "layers": [fingerprint.layers[i].hex() for i in range(fingerprint.layer_count)],
            "rope": [fingerprint.rope[i].hex() for i in range(fingerprint.layer_count)],
            "shared": {name: d.hex() for name, d in fingerprint.shared.items()},
            "tokenizer": fingerprint.tokenizer.hex(),
            "adapter": fingerprint.adapter.hex(),
        }
    )


def canonical_config(config: Mapping[str, Any]) -> dict[str, object]:
    """The config without what changes no number; infinities become text."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): clean(v) for k, v in value.items() if k not in VOLATILE}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if isinstance(value, float) and not -1e308 < value < 1e308:
            return str(value)
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    cleaned: dict[str, object] = clean(config)
    return cleaned


def merge(parts: Sequence[ModelFingerprint]) -> ModelFingerprint:
    """One fingerprint out of those of several machines that hold parts of a model.

    Raises:
        ModelError: they are of different models, or disagree about a layer.
    """
    if not parts:
        raise ModelError("no fingerprints to merge")
    first = parts[0]
    common = {
        (canonical_json(dict(p.config)), p.tokenizer, p.adapter, p.layer_count) for p in parts
    }
    if len(common) > 1:
        raise ModelError("machines hold different models: config, tokenizer or adapter differ")
    layers: dict[int, bytes] = {}
    rope: dict[int, bytes] = {}
    shared: dict[str, bytes] = {}
    for part in parts:
        _take(layers, part.layers)
        _take(rope, part.rope)
        _take(shared, part.shared)
    return replace(first, layers=layers, rope=rope, shared=shared)


def _take(known: dict[_Key, bytes], more: Mapping[_Key, bytes]) -> None:
    for name, digest in more.items():
        if known.setdefault(name, digest) != digest:
            raise ModelError(f"machines hold different weights for {name!r} of the model")
