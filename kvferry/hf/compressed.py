"""A cache for ``model.generate(past_key_values=...)`` that keeps its history encoded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvferry.codec.base import CalibrationSource, Codec, NoCalibrations
from kvferry.errors import ConfigError
from kvferry.hf.compressed_layer import CompressedLayer

CHUNK_TOKENS = 64
WINDOW_TOKENS = 128


class CompressedCache(Cache):
    """One `CompressedLayer` for each layer of the model, or a plain one where it is exact.

    Prefill sees exact rows; what lies more than ``window`` tokens behind is encoded in
    chunks as it leaves the window, and decoded anew at each step, so that memory is what
    the codec makes of it plus one layer decoded. Batches, beams and cropping work as with
    a `DynamicCache`. Codecs run on the CPU: on another device rows cross over at each step.

    Args:
        layers: of the model.
        codec: any that codes a single layer; or one for each layer. Codecs with a
            calibration need one of each single layer (`GroupCalibration.cut`).
        identity: absolute layers to keep exact.
        chunk, window: in tokens.
        calibrations: what decoding looks calibrations up in.
    Raises: ConfigError: a layer that is not in the model, or without a codec.
    """

    def __init__(
        self,
        layers: int,
        codec: Codec | Mapping[int, Codec],
        *,
        identity: Collection[int] = (),
        chunk: int = CHUNK_TOKENS,
        window: int = WINDOW_TOKENS,
        calibrations: CalibrationSource | None = None,
    ) -> None:
        if chunk < 1 or window < 0:
            raise ConfigError("chunk, window", (chunk, window), "at least 1 and 0 tokens")
        odd = sorted(set(identity) - set(range(layers)))
        if odd:
            raise ConfigError("identity", odd, f"layers of the model, 0 to {layers - 1}")
        source = calibrations or NoCalibrations()
        made: list[Any] = []
        for layer in range(layers):
            used = codec.get(layer) if isinstance(codec, Mapping) else codec
            if layer in identity:
                made.append(DynamicLayer())
            elif used is None:
                raise ConfigError("codec", f"none for layer {layer}", "one for every layer")
            else:
                made.append(CompressedLayer(layer, used, source, chunk, window))
        super().__init__(layers=made)

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
