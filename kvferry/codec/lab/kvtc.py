"""Text through the live model, and out comes a calibration of the published codec."""

from collections.abc import Callable, Sequence

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.calibration import GroupAccumulator
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.kvtc_fit import KvtcFit
from kvferry.codec.lab.forward import prefill
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.errors import ConfigError

# The covariance of SmolLM2-135M is 5,760 wide: fewer tokens would leave it singular.
DEFAULT_TOKENS = 16_384
SEQUENCE_TOKENS = 2048
MIN_TOKENS = 512
APART_TOKENS = 1024
# Two bases and their errors cost about as much as prefilling so many tokens.
_FIT_WORK = 8192.0
Report = Callable[[float, str], None]


def calibration_work(tokens: int) -> float:
    """What `calibrate` reports at its end, in prefilled tokens; ``tokens`` of all texts."""
    return tokens + _FIT_WORK


def calibrate(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    source: str,
    report: Report,
    apart: Sequence[Sequence[int]] = (),
) -> KvtcCalibration:
    """One basis per stream over all layers and heads, and plans for common ratios.

    Args:
        tokens: of text; read `SEQUENCE_TOKENS` at a time.
        source: where the text came from, for people.
        report: called with work done so far, of `calibration_work`, and a note.
        apart: tokens of other texts; what quantization costs is measured on them, or on
            ``tokens`` where there are none.
    Raises: ModelError: a cache that is not supported; ConfigError: too little text, or a
        model that is too wide for one basis.
    """
    if len(tokens) < MIN_TOKENS:
        raise ConfigError("tokens", len(tokens), f"at least {MIN_TOKENS}")
    shape = describe(loaded.model, loaded.config)
    ropes = stream_ropes(loaded.model, shape)
    whole = (0, shape.layers)
    heads = (0, shape.kv_heads)
    seen = KvtcFit(
        GroupAccumulator(model_id=model_id, layers=whole, heads=heads, ropes=ropes, joint=False)
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, "reading")

    def read(part: Sequence[int]) -> PageTensors:
        cache = make_prompt_cache(loaded.model)
        prefill(loaded.model, part, cache, advance)
        snapshot = adapters.snapshot(cache, len(part), latent=shape.latent)
        return snapshot.page(whole, (0, len(part)))

    for start in range(0, len(tokens), SEQUENCE_TOKENS):
        seen.add(read(tokens[start : start + SEQUENCE_TOKENS]))
    for part in apart:
        seen.measure_on(read(part))
    report(done, "fitting")
    made = seen.finish(source)
    report(calibration_work(done), "fitting")
    return made
