"""Which model a torch cache belongs to.

An identity is the digest of what is in memory: every parameter and persistent buffer of the
live model (names, shapes, dtypes, bytes), its config, its tokenizer and its rotation, so
that a cast, an adapter or a quantizer each make another model of it.

It is never that of the same weights under MLX. Both could share pages to within rounding:
logits agree to 1e-4 on SmolLM2. But what both sides digest to know that they hold the same
content differs (files there, live tensors here); that two implementations of one
architecture compute the same function is nothing that a digest can see (a scaled rotation, a
window that one of them leaves out); and a page from elsewhere would make a greedy answer
depend on who was asked first. The price of a wrong hit is a wrong answer, that of apartness
a prompt prefilled once more, so torch models are their own: ``engine`` in the config says
so. Devices and kernels of one engine (CPU and CUDA, eager and flash attention) do share, as
MLX's CPU and Metal do.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3

from kvferry.codec.base import DType
from kvferry.codec.rope import RopeSpec
from kvferry.errors import ModelError
from kvferry.hf.layer_ropes import layer_ropes
from kvferry.hf.rope import model_ropes
from kvferry.hf.tensors import dtype_of
from kvferry.proto.identity import ModelFingerprint, canonical_config, model_id
from kvferry.proto.keys import canonical_json

ENGINE = "transformers"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_UNKNOWN_ROPE = bytes(32)


@dataclass(frozen=True, slots=True)
class TorchModel:
    """What keys and blobs say of a model.

    Attributes:
        model_id: 32 bytes.
        layers, heads: of the whole model; heads are KV heads.
        head_dim: of keys.
        dtype: of the weights, and so of its caches; caches of another are not stored.
        ropes: how each layer rotates its keys, ``dims`` 0 where it does not; empty where
            that is not known.
    """

    model_id: bytes
    layers: int
    heads: int
    head_dim: int
    dtype: DType
    ropes: tuple[RopeSpec, ...] = ()


def identify(model: Any, tokenizer: Any) -> TorchModel:
    """Digest a live model; reads all of its weights once, at about 1 GB/s from a CPU.

    It also runs six tokens through it, to see which layers rotate their keys.

    Args:
        model: a decoder of transformers.
        tokenizer: a fast tokenizer of transformers, a ``tokenizers.Tokenizer``, or
            `load_smollm2`'s; None only where token ids are made by other means.
    Raises: ModelError: weights that are not in memory, a tokenizer that is not known,
        weights of a dtype that caches cannot have.
    """
    config = model.config.get_text_config(decoder=True)
    layers = int(config.num_hidden_layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = _digests(model.state_dict(), layers)
    ropes = model_ropes(model, layers)
    made = model_id(fingerprint(model, tokenizer, groups, ropes, layers))
    # Not part of the identity: a trial may fail on one machine and not on another.
    tried = layer_ropes(model, ropes)
    return TorchModel(made, layers, int(heads), int(dim), dtype_of(model.dtype), tried)


def fingerprint(
    model: Any,
    tokenizer: Any,
    groups: Mapping[str, bytes],
    ropes: Sequence[RopeSpec],
    layers: int,
) -> ModelFingerprint:
    """What the identity is made of. ``groups``: layer number, or "", -> digest of weights."""
    return ModelFingerprint(
        config=canonical_config(model.config.to_dict()) | {"engine": ENGINE},
        layers={index: groups.get(str(index), bytes(32)) for index in range(layers)},
        layer_count=layers,
        shared={"shared": groups.get("", bytes(32))},
        tokenizer=_tokenizer_digest(tokenizer),
        rope={i: ropes[i].fingerprint() if ropes else _UNKNOWN_ROPE for i in range(layers)},
    )


def _digests(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, bytes]:
    """Layer number, or "" for the rest -> digest of its tensors in the order of names."""
    hashers: dict[str, Any] = {}
    for name in sorted(state):
        found = _LAYER.search(name)
        group = found[1] if found is not None and int(found[1]) < layers else ""
        hasher = hashers.setdefault(group, blake3())
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            raise ModelError(f"{name} of the model is not in memory here: load it whole")
        about = {"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        hasher.update(canonical_json(about))
        try:
            bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        except (RuntimeError, NotImplementedError, TypeError) as exc:
            raise ModelError(
                f"{name} of the model is a {type(tensor).__name__}, whose bytes cannot be read"
            ) from exc
        hasher.update(memoryview(bits.numpy()))
    return {group: hasher.digest() for group, hasher in hashers.items()}


def _tokenizer_digest(tokenizer: Any) -> bytes:
    """Of vocabulary, merges and rules; what a call sets for itself (padding) is left out."""
    if tokenizer is None:
        return bytes(32)
    for name in ("backend_tokenizer", "backend"):
        tokenizer = getattr(tokenizer, name, tokenizer)
    if not hasattr(tokenizer, "to_str"):
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__} cannot be digested: use a fast one "
            "(AutoTokenizer's default)"
        )
    rules = json.loads(tokenizer.to_str())
    return blake3(canonical_json(rules | {"truncation": None, "padding": None})).digest()
