"""How a transformers model rotates its keys, read off the live modules and tried out."""

import sys
from typing import Any

import numpy as np
import torch

from kvferry.codec.rope import RopeSpec, apply, positions_of

_PROBE_OFFSETS = (0, 3, 1021)
_PROBE_TOLERANCE = 2e-3  # of positions times frequencies in float32


def model_ropes(model: Any, layers: int) -> tuple[RopeSpec, ...]:
    """One spec per layer; empty where the rotation is not one that pages can undo.

    Read from the one rotary module of the decoder and compared with what the model's own
    functions do to random keys: halves and pairs are told apart so. Rotations that change
    with the length of the sequence (dynamic NTK, longrope) or from layer to layer are not
    among them; caches of such models are stored by codecs that need no rotation.
    """
    rotary = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "rotary_emb"]
    if len(rotary) != 1 or not isinstance(getattr(rotary[0], "inv_freq", None), torch.Tensor):
        return ()
    module = rotary[0]
    if getattr(module, "rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return ()
    functions = sys.modules[type(module).__module__]
    rotate = getattr(functions, "apply_rotary_pos_emb", None)
    if rotate is None:
        return ()
    inv_freq = tuple(float(f) for f in module.inv_freq.detach().float().cpu().tolist())
    scale = float(getattr(module, "attention_scaling", 1.0))
    for traditional in (False, True):
        spec = RopeSpec(2 * len(inv_freq), traditional, inv_freq, scale)
        if _does(module, rotate, spec):
            return (spec,) * layers
    return ()


def _does(module: Any, rotate: Any, spec: RopeSpec) -> bool:
    """Whether the model's functions do to random keys what ``spec`` says."""
    keys = np.random.default_rng(0).standard_normal((1, 1, 2, spec.dims)).astype(np.float32)
    device = module.inv_freq.device
    asked = torch.from_numpy(keys).to(device)
    for offset in _PROBE_OFFSETS:
        positions = positions_of((offset, offset + 2))
        try:
            cos, sin = module(asked, torch.from_numpy(positions)[None].to(device))
            _, live = rotate(asked, asked, cos, sin)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # functions of another form than llama's
        ours = apply(keys, spec, positions)
        found = live.detach().float().cpu().numpy()
        if found.shape != ours.shape or np.abs(found - ours).max() > _PROBE_TOLERANCE:
            return False
    return True
