"""Calibrations in the torch world: found in folders, made for a torch model, kept at hand."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.files import read_capped
from kvferry.codec.lowrank_calibration import (
    LAYER_NORM,
    RMS_NORM,
    UNKNOWN_NORM,
    LowRankCalibration,
)
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
    IdentityMismatchError,
    ModelError,
)
from kvferry.hf.identity import TorchModel
from kvferry.hf.tensors import read
from kvferry.proto.container import DEFAULT_LIMITS

SEQUENCE_TOKENS = 1024


class AtHand:
    """A `CalibrationSource` of calibrations in memory."""

    def __init__(self, groups: Iterable[GroupCalibration] = ()) -> None:
        self._groups = {group.id: group for group in groups}

    def get(self, calibration_id: bytes) -> GroupCalibration:
        """Raises: CalibrationMissingError."""
        if calibration_id not in self._groups:
            raise CalibrationMissingError(calibration_id.hex())
        return self._groups[calibration_id]


def load_groups(path: Path) -> list[GroupCalibration]:
    """Calibrations of a model's layer groups, in layer order.

    Args:
        path: a folder that ``kvferry calibrate`` wrote, or one group's file.
    Raises: ConfigError: nothing is there; CodecError: what is there is damaged.
    """
    if path.is_dir():
        _, groups = CalibrationSet.load(path)
        return sorted(groups, key=lambda group: group.layers)
    try:
        data = read_capped(path, DEFAULT_LIMITS.max_blob)
    except (OSError, ValueError) as exc:  # ValueError: no path has a NUL
        why = getattr(exc, "strerror", None) or exc
        allowed = f"a calibration; `kvferry calibrate` makes one ({why})"
        raise ConfigError("calibration", str(path), allowed) from exc
    return [group_from_blob(data)]


def by_layer(groups: Sequence[GroupCalibration]) -> dict[int, GroupCalibration]:
    """Absolute layer -> the cut of just that layer, all heads."""
    return {
        layer: group.cut((layer, layer + 1), group.heads)
        for group in groups
        for layer in range(*group.layers)
    }


def adopt(calibration: GroupCalibration, model: TorchModel) -> GroupCalibration:
    """A calibration that was made elsewhere (with MLX, say) for a torch model's blobs.

    A calibration is a basis: with one of other weights blobs are larger or coarser, and
    come back as what they were stored as all the same. So it is the caller who says that
    both are of one model; shapes and rotation are compared.

    Returns: the same content under the model's identity, and so with an id of its own.
    Raises: IdentityMismatchError: other layers, heads or dims, or another rotation.
    """
    fits = calibration.layers[1] <= model.layers and calibration.heads == (0, model.heads)
    dims = {part.dim for name, part in calibration.streams.items() if name == "k"}
    if not fits or not dims <= {model.head_dim}:
        found = f"layers {calibration.layers}, heads {calibration.heads}, dims {sorted(dims)}"
        wanted = f"{model.layers} layers, {model.heads} heads of {model.head_dim}"
        raise IdentityMismatchError("calibration", found, wanted)
    for layer, fingerprints in calibration.layer_ropes.items():
        live = model.ropes[layer].fingerprint() if model.ropes else b""
        if fingerprints - {live}:
            found = min(fingerprints).hex()[:16]
            raise IdentityMismatchError(f"rope of layer {layer}", found, live.hex()[:16] or "-")
    return replace(calibration, model_id=model.model_id)


def calibrate_lowrank(
    model: Any,
    known: TorchModel,
    tokens: Sequence[int],
    source: str = "text",
    *,
    sequence: int = SEQUENCE_TOKENS,
) -> LowRankCalibration:
    """Run text through a torch model and fit the bases of ``lowrank`` to its cache.

    Args:
        known: what `identify` gave for ``model``.
        tokens: of text, some thousands; cut into sequences of ``sequence``.
        source: where the text came from, for people.
    Returns: K and V of all layers and heads; cut it for single layers.
    Raises: ModelError: a cache that cannot be read; UnsupportedTensorError: too little text.
    """
    seen: HeadAccumulator | None = None
    device = next(model.parameters()).device
    for start in range(0, len(tokens), sequence):
        asked = torch.tensor([list(tokens[start : start + sequence])], device=device)
        with torch.no_grad():
            cache = model(asked, past_key_values=DynamicCache(), logits_to_keep=1).past_key_values
        page = read(cache)
        if seen is None:
            seen = HeadAccumulator(
                model_id=known.model_id,
                layers=page.layers,
                heads=page.heads,
                shapes={n: (s.data.shape[1], s.data.shape[3]) for n, s in page.streams.items()},
                ropes={"k": known.ropes} if known.ropes else {},
            )
        seen.add(page)
    if seen is None:
        raise ModelError("no tokens to calibrate on")
    return seen.finish(source, norm=_norm(model))


def _norm(model: Any) -> str:
    """What the norms of the decoder are, by their classes."""
    names = {type(module).__name__.lower() for module in model.modules()}
    if any("rmsnorm" in name for name in names):
        return RMS_NORM
    return LAYER_NORM if any("layernorm" in name for name in names) else UNKNOWN_NORM
