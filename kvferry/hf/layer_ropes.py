"""Which layers of a transformers model rotate their keys, found by running it.

A model's one rotary module says how, and nothing says of which layers: SmolLM 3, Cohere 2 and
EXAONE 4 have some that never use it, each marked in a way of its own.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from kvferry.codec.base import FloatArray
from kvferry.codec.rope import RopeSpec, apply, undo

log = logging.getLogger(__name__)

NO_ROPE = RopeSpec(0, False, ())
_POSITIONS = (0, 3, 1021)
_TOKENS = 2
# Of the length of the keys: cosines and products are rounded to the model's dtype.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_NOT_OURS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError)


def layer_ropes(model: Any, ropes: Sequence[RopeSpec]) -> tuple[RopeSpec, ...]:
    """What each layer does: as its rotary module, or nothing; empty where that is not known.

    The same tokens are run at several positions, each as a sequence of its own, where
    attention sees a token and nothing else: only the rotation can make keys differ. It takes
    one forward of six tokens. A log line names the layer whose keys do neither.

    Args:
        model: a decoder; it runs in evaluation mode and is left in its own.
        ropes: from `kvferry.hf.rope.model_ropes`, of each layer.
    Returns: one of ``ropes`` or `NO_ROPE` per layer. Empty also where no layer's keys move,
        since the model may not heed positions that it is given.
    """
    if not ropes:
        return ()
    try:
        keys = _keys(model, len(ropes))
        found = [_of(held, spec) for held, spec in zip(keys, ropes, strict=True)]
    except (*_NOT_OURS, TypeError, ValueError) as exc:
        log.info("how keys rotate is not known, a trial failed: %s: %s", type(exc).__name__, exc)
        return ()
    specs = tuple(spec for spec in found if spec is not None)
    if len(specs) < len(found):
        log.info("how keys of layer %d rotate is not known", found.index(None))
        return ()
    if all(spec == NO_ROPE for spec in specs):
        log.info("how keys rotate is not known: those of no layer move")
        return ()
    return specs


def _keys(model: Any, layers: int) -> list[torch.Tensor]:
    """Of each layer, (positions x tokens, heads, 1, dim)."""
    device = next(model.parameters()).device
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    tokens = [size * (at + 1) // (_TOKENS + 1) for at in range(_TOKENS)]
    asked = torch.tensor(tokens * len(_POSITIONS), device=device)[:, None]
    positions = torch.tensor(_POSITIONS, device=device).repeat_interleave(_TOKENS)[:, None]
    cache = DynamicCache()
    # A model that is compiled elsewhere is not compiled for this.
    with torch.no_grad(), _evaluating(model), torch.compiler.set_stance("force_eager"):
        model(asked, position_ids=positions, past_key_values=cache, use_cache=True)
    if len(cache.layers) != layers:
        raise ValueError(f"{len(cache.layers)} layers of {layers} have a cache")
    return [layer.keys for layer in cache.layers]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, which would make keys of one token differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _of(held: torch.Tensor, spec: RopeSpec) -> RopeSpec | None:
    """What made keys out of those at position 0; None: neither ``spec`` nor nothing did.

    Keys for which both hold, such as none but zeros, say nothing.
    """
    host = held.detach().float().cpu().numpy()
    keys: FloatArray = host.reshape(len(_POSITIONS), -1, host.shape[-1]).swapaxes(0, 1)
    at = np.array(_POSITIONS, dtype=np.int64)
    first = np.repeat(keys[:, :1], len(at), axis=1)
    rotated = apply(undo(first, spec, np.zeros_like(at)), spec, at)
    allowed = _TOLERANCE[held.dtype] * float(np.linalg.norm(keys))
    fits = [
        rope for rope, made in ((spec, rotated), (NO_ROPE, first)) if _near(keys, made, allowed)
    ]
    return fits[0] if len(fits) == 1 else None


def _near(keys: FloatArray, made: FloatArray, allowed: float) -> bool:
    return float(np.linalg.norm(keys - made)) <= allowed
