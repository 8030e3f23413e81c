"""A cache for ``model.generate(past_key_values=...)`` that keeps its history encoded."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvferry.codec.base import CalibrationSource, Codec, NoCalibrations
from kvferry.codec.lowrank import LowRankCodec
from kvferry.errors import ConfigError
from kvferry.hf.calibrations import AtHand
from kvferry.hf.compressed_layer import CompressedLayer
from kvferry.hf.history import EncodedHistory, History
from kvferry.hf.lacking import check_keeps
from kvferry.hf.lowrank_history import LowRankHistory
from kvferry.hf.preset import preset_coding

CHUNK_TOKENS = 128
WINDOW_TOKENS = 128


class CompressedCache(Cache):
    """One `CompressedLayer` for each layer of the model, or a plain one where it is exact.

    Prefill sees exact rows; what lies more than ``window`` tokens behind is encoded in
    chunks as it leaves the window, and decoded anew at each step, so that memory is what
    the codec makes of it plus one layer decoded. Batches, beams and cropping work as with
    a `DynamicCache`. ``lowrank`` of V runs where the model does; other codecs run on the CPU,
    so that on another device rows cross over at each step.

    Args:
        codec: one that codes any layer by itself (``affine``, ``bitpack``), or ``lowrank``
            calibrated for all layers, of which each takes its part; or one for each layer:
            other codecs with a calibration need that of the single layer.
        identity: absolute layers to keep exact; those of a ``lowrank`` are as well.
        chunk: tokens encoded together; the larger, the less time each step takes.
        window: newest tokens that are never encoded.
        calibrations: what decoding looks calibrations up in that a codec does not have.
    Raises: ConfigError; a layer, once it is first run, also for a codec of other layers, and
        UnsupportedTensorError for one of other heads.
    """

    def __init__(
        self,
        codec: Codec | Mapping[int, Codec],
        *,
        identity: Collection[int] = (),
        chunk: int = CHUNK_TOKENS,
        window: int = WINDOW_TOKENS,
        calibrations: CalibrationSource | None = None,
    ) -> None:
        if chunk < 1 or window < 0:
            raise ConfigError("chunk, window", (chunk, window), "at least 1 and 0 tokens")
        source = calibrations or NoCalibrations()

        def following() -> Any:
            """The layer after those that are there: a model's layers come in order."""
            layer = len(self.layers)
            used = codec.get(layer) if isinstance(codec, Mapping) else codec
            if layer in identity:
                return DynamicLayer()
            if used is None:
                raise ConfigError("codec", f"none for layer {layer}", "one for every layer")
            check_keeps(used, "a cache that goes on encoding")
            used = _of_layer(used, layer)
            if isinstance(used, LowRankCodec) and layer in used.identity:
                return DynamicLayer()
            return CompressedLayer(partial(_history, layer, used, source), chunk, window)

        super().__init__(layer_class_to_replicate=following)

    @classmethod
    def from_preset(
        cls,
        preset: Path | str,
        calibration: Path | str | None = None,
        *,
        chunk: int = CHUNK_TOKENS,
        window: int = WINDOW_TOKENS,
    ) -> Self:
        """As a preset says: what ``kvferry tune`` wrote, or the shorter form in
        `kvferry.hf.preset`.

        Args:
            preset: file.
            calibration: folder or file; by default what the preset names, else where
                ``kvferry calibrate`` leaves it.
        Raises: ConfigError: files that are not there or not what they should be;
            CalibrationMissingError, CalibrationCorruptError.
        """
        coding = preset_coding(Path(preset), None if calibration is None else Path(calibration))
        return cls(
            coding.codec,
            identity=coding.identity,
            chunk=chunk,
            window=window,
            calibrations=coding.calibrations,
        )

    def to_dynamic(self) -> DynamicCache:
        """What the model sees, as a plain cache, for `kvferry.hf.offload` say.

        Decoded history that is encoded again loses once more.
        """
        rows: Sequence[Any] = [
            layer.decoded() if isinstance(layer, CompressedLayer) else (layer.keys, layer.values)
            for layer in self.layers
            if layer.is_initialized
        ]
        return DynamicCache(rows)

    @property
    def nbytes(self) -> int:
        """Bytes held: encoded history and exact rows."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                total += sum(layer.nbytes)
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total


def _of_layer(codec: Codec, layer: int) -> Codec:
    """With the calibration of that layer alone. Raises: ConfigError: it is of others."""
    known = getattr(codec, "calibration", None)
    if known is None or known.layers == (layer, layer + 1):
        return codec
    found = f"{codec.name} calibrated for layers {known.layers[0]} to {known.layers[1] - 1}"
    if layer not in range(*known.layers):
        raise ConfigError("codec", found, f"calibrated for layer {layer}, which it is to encode")
    if not isinstance(codec, LowRankCodec):
        raise ConfigError("codec", found, "one for each layer, with the calibration cut to it")
    part = known.cut((layer, layer + 1), known.heads)
    return replace(codec, calibration=part, identity=tuple({layer} & set(codec.identity)))


def _history(layer: int, codec: Codec, calibrations: CalibrationSource) -> History:
    if isinstance(codec, LowRankCodec):
        if set(codec.rank) == {"v"}:
            return LowRankHistory(codec)
        if codec.calibration is not None:
            calibrations = AtHand([codec.calibration])
    return EncodedHistory(layer, codec, calibrations)
