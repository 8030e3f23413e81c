"""One codec, one model, one text: what it costs in bytes, and in what the model says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.calibration import CurvePoint, GroupCalibration, layer_groups
from kvferry.codec.lab.coding import Coded, Coder, GroupSource, group_codecs
from kvferry.codec.lab.compare import Comparison, compare
from kvferry.codec.lab.forward import Done, prefill
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.shape import describe
from kvferry.errors import ConfigError
from kvferry.proto.keys import WINDOW_TOKENS

TAIL_CODEC: tuple[str, Mapping[str, object]] = ("affine", {"bits": 8})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to evaluate.

    Attributes:
        codec, options: as `make_codec` takes them.
        context: tokens that the codec codes, in pages.
        continuation: tokens that follow the window, teacher-forced.
        groups, curve: the model's calibration, for codecs that need one.
    """

    codec: str
    options: Mapping[str, object] = field(default_factory=dict)
    context: int = 2048
    continuation: int = 512
    groups: Sequence[GroupCalibration] = ()
    curve: Sequence[CurvePoint] = ()

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("continuation", self.continuation)):
            if value < 1:
                raise ConfigError(name, value, "at least 1 token")

    @property
    def text_tokens(self) -> int:
        """Tokens of text that this takes; the last is only predicted."""
        return self.context + WINDOW_TOKENS + self.continuation + 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Pages, tail, and what the model made of them."""

    setup: Setup
    pages: Coded
    tail: Coded
    found: Comparison

    def to_json(self, model: str) -> dict[str, object]:
        """The object of design section 13."""
        raw = 2 * self.pages.values
        with_tail = raw + 2 * self.tail.values
        return {
            "model": model,
            "codec": self.setup.codec,
            "options": dict(self.setup.options),
            "context_tokens": self.setup.context,
            "window_tokens": WINDOW_TOKENS,
            "continuation_tokens": self.setup.continuation,
            "raw_bytes_fp16": raw,
            "blob_bytes": self.pages.blob_bytes,
            "tail_bytes": self.tail.blob_bytes,
            "compression_ratio": raw / self.pages.blob_bytes,
            "ratio_with_tail": with_tail / (self.pages.blob_bytes + self.tail.blob_bytes),
            "bits_per_value": 8 * self.pages.blob_bytes / self.pages.values,
            "kl_mean": self.found.kl_mean,
            "kl_p99": self.found.kl_p99,
            "ppl_exact": self.found.ppl_exact,
            "ppl_restored": self.found.ppl_restored,
            "ppl_delta_pct": self.found.ppl_delta_pct,
            "top1_agreement": self.found.top1_agreement,
            "encode_seconds": self.pages.encode_seconds,
            "decode_seconds": self.pages.decode_seconds,
        }


def evaluate(
    loaded: LoadedModel, model_id: bytes, tokens: Sequence[int], setup: Setup, done: Done
) -> Evaluation:
    """Prefill, code, restore, compare.

    Args:
        tokens: ``setup.text_tokens`` of them.
        done: called with numbers of tokens run: each of ``tokens`` once, those of the
            continuation once more.
    Raises: ModelError, CodecError, ConfigError.
    """
    if len(tokens) != setup.text_tokens:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{setup.text_tokens} tokens")
    model: Any = loaded.model
    shape = describe(model, loaded.config)
    whole = (0, shape.layers)
    ranges = [group.layers for group in setup.groups] or layer_groups(
        shape.layers, shape.kv_heads, shape.head_dim
    )
    codecs = group_codecs(setup.codec, setup.options, ranges, setup.groups, setup.curve)
    _warm(setup.groups)
    source = GroupSource(setup.groups)
    page_coder = Coder(model_id, codecs, source, shape.kv_heads)
    tail_codecs = group_codecs(*TAIL_CODEC, [whole])
    tail_coder = Coder(model_id, tail_codecs, source, shape.kv_heads, kind="tail")

    held = setup.context + WINDOW_TOKENS
    exact = make_prompt_cache(model)
    prefill(model, tokens[:held], exact, done)
    snapshot = adapters.snapshot(exact, held)
    pages = page_coder.run(snapshot, (0, setup.context))
    tail = tail_coder.run(snapshot, (setup.context, held))
    restored = make_prompt_cache(model)
    adapters.restore(restored, [*pages.pages, *tail.pages])
    found = compare(model, exact, [restored], tokens[held:], lambda n: done(2 * n))
    return Evaluation(setup, pages, tail, found[0])


def _warm(groups: Sequence[GroupCalibration]) -> None:
    """Fold matrices now: a process does it once, so it is no part of a page's time."""
    for group in groups:
        for stream in group.streams.values():
            _ = stream.fold
