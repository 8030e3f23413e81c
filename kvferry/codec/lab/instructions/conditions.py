"""A codec of an experiment as what it does to a conversation's cache."""

from functools import partial
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from kvferry.codec.base import Codec, drops_tokens
from kvferry.codec.lab.coding import Coded
from kvferry.codec.lab.experiment.spec import CodecSpec
from kvferry.codec.lab.instructions.memory import Dropping, Memory, Recoding, Whole
from kvferry.codec.lab.live import compress_live
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.registry import CODECS, make_codec

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.bench import Bench


def memory_for(spec: CodecSpec, bench: "Bench", conversation: str = "") -> Memory:
    """For one conversation.

    Args:
        conversation: its name. A codec that draws lots, and was given no seed, draws others
            for each: where all lost the same positions they would be one draw, not many.
    Raises: ConfigError, CalibrationMissingError.
    """
    if spec.name == "raw":
        return Whole()
    if drops_tokens(CODECS[spec.name]):
        ropes = partial(page_ropes, bench.model, bench.shape.page_layers)
        compress = partial(compress_live, ropes=ropes, latent=bench.shape.latent)
        retention = None if spec.ratio is None else 1 / spec.ratio
        return Dropping(partial(_codec, spec, conversation), retention, compress)

    def snap(cache: list[Any], tokens: int) -> CacheSnapshot:
        return adapters.snapshot(cache, tokens, latent=bench.shape.latent)

    def code(held: CacheSnapshot, span: tuple[int, int]) -> Coded:
        return bench.coded(spec, held, span).coded

    return Recoding(bench.model, snap, code)


def _codec(spec: CodecSpec, conversation: str, ratio: float | None) -> Codec:
    options = dict(spec.options)
    if ratio is not None:
        options["ratio"] = ratio
    codec = make_codec(spec.name, options)
    if "seed" not in codec.params or "seed" in options:
        return codec
    seed = int.from_bytes(blake3(conversation.encode()).digest(4), "little")
    return make_codec(spec.name, {**options, "seed": seed})
