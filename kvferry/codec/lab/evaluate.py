"""One codec, one model, one text: what it costs in bytes, and in what the model says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import Codec
from kvferry.codec.calibration import CurvePoint, GroupCalibration, layer_groups
from kvferry.codec.lab.coding import Coded, Coder, GroupSource, LayerRange, group_codecs
from kvferry.codec.lab.compare import Comparison, Reference, compare_with, references
from kvferry.codec.lab.forward import Done, prefill
from kvferry.codec.lab.stream_error import StreamError, stream_errors
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.mlx.shape import ModelShape
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
    """Pages, tail, and what the model made of them.

    Attributes:
        errors: by stream; empty where what came back does not stand token for token for
            what went in.
    """

    setup: Setup
    pages: Coded
    tail: Coded
    found: Comparison
    errors: Mapping[str, StreamError] = field(default_factory=dict)

    def to_json(self, model: str) -> dict[str, object]:
        """The object of design section 13."""
        raw = 2 * self.pages.values
        with_tail = raw + 2 * self.tail.values
        return {
            "model": model,
            "codec": self.setup.codec,
            "options": dict(self.setup.options),
            "context_tokens": self.setup.context,
            "context_entries": sum(page.entries for page in self.pages.pages),
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
            "logit_cosine": self.found.logit_cosine,
            "encode_seconds": self.pages.encode_seconds,
            "decode_seconds": self.pages.decode_seconds,
            "errors": {name: error.to_json() for name, error in self.errors.items()},
        }


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One text, read once: all that any number of settings are measured against.

    Attributes:
        context, continuation: tokens, as in `Setup`.
        snapshot: the exact cache of context and window.
        tail: the window as it would be stored; no setting changes it.
        reference: see `references`; float32 for each token of the continuation and
            entry of the vocabulary, 100 MB for 512 tokens of 49,152.
    """

    model: Any
    model_id: bytes
    shape: ModelShape
    context: int
    continuation: int
    snapshot: CacheSnapshot
    tail: Coded
    reference: Sequence[Reference]

    def setup(
        self,
        codec: str,
        options: Mapping[str, object],
        groups: Sequence[GroupCalibration] = (),
        curve: Sequence[CurvePoint] = (),
    ) -> Setup:
        """To `measure` a codec on this text."""
        return Setup(
            codec=codec,
            options=options,
            context=self.context,
            continuation=self.continuation,
            groups=groups,
            curve=curve,
        )


def prepare(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    context: int,
    continuation: int,
    done: Done,
) -> Prepared:
    """Prefill, and what the model goes on to say with the exact cache.

    Args:
        tokens: context, window, continuation and one more.
        done: called with numbers of tokens run: each of ``tokens`` but the last once.
    Raises: ModelError, ConfigError.
    """
    held = context + WINDOW_TOKENS
    wanted = Setup(codec="", context=context, continuation=continuation).text_tokens
    if len(tokens) != wanted:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{wanted} tokens")
    model: Any = loaded.model
    shape = describe(model, loaded.config)
    exact = make_prompt_cache(model)
    prefill(model, tokens[:held], exact, done)
    ropes = partial(page_ropes, model, shape.page_layers)
    snapshot = adapters.snapshot(exact, held, latent=shape.latent, ropes=ropes)
    tail_codecs = group_codecs(*TAIL_CODEC, [(0, shape.layers)])
    coder = Coder(model_id, tail_codecs, GroupSource(), shape.kv_heads, kind="tail")
    tail = coder.run(snapshot, (context, held))
    reference = []
    for part in references(model, exact, tokens[held:]):
        reference.append(part)
        done(len(part.fed))
    return Prepared(model, model_id, shape, context, continuation, snapshot, tail, reference)


def measure(prepared: Prepared, setup: Setup, done: Done) -> Evaluation:
    """Code, restore, compare.

    Args:
        done: called with numbers of tokens run: the continuation once.
    Raises: ModelError, CodecError, ConfigError.
    """
    if (setup.context, setup.continuation) != (prepared.context, prepared.continuation):
        raise ConfigError("context", setup.context, f"{prepared.context}, as it was prepared")
    coder = coder_of(prepared.model_id, prepared.shape, setup)
    return judge(prepared, setup, coder.run(prepared.snapshot, (0, setup.context)), done)


def coder_of(model_id: bytes, shape: ModelShape, setup: Setup) -> Coder:
    """What codes any text of the model as ``setup`` says. Raises: CodecError, ConfigError."""
    codecs = _codecs(setup, shape)
    _warm(setup.groups)
    return Coder(model_id, codecs, GroupSource(setup.groups), shape.kv_heads)


def judge(prepared: Prepared, setup: Setup, pages: Coded, done: Done) -> Evaluation:
    """Restore, compare.

    Args:
        pages: what `coder_of` made of the context.
        done: called with numbers of tokens run: the continuation once.
    Raises: ModelError.
    """
    restored = make_prompt_cache(prepared.model)
    prepared.snapshot.refill(restored, [*pages.pages, *prepared.tail.pages])
    found = compare_with(prepared.model, prepared.reference, [restored], done)
    errors = stream_errors(prepared.snapshot, pages.pages)
    return Evaluation(setup, pages, prepared.tail, found[0], errors)


def evaluate(
    loaded: LoadedModel, model_id: bytes, tokens: Sequence[int], setup: Setup, done: Done
) -> Evaluation:
    """`prepare` and `measure`, for one setting on one text.

    Args:
        tokens: ``setup.text_tokens`` of them.
        done: called with numbers of tokens run: each of ``tokens`` once, those of the
            continuation once more.
    Raises: ModelError, CodecError, ConfigError.
    """
    _codecs(setup, describe(loaded.model, loaded.config))  # refused before the model runs
    prepared = prepare(loaded, model_id, tokens, setup.context, setup.continuation, done)
    return measure(prepared, setup, done)


def _codecs(setup: Setup, shape: ModelShape) -> Mapping[LayerRange, Codec]:
    ranges = [group.layers for group in setup.groups] or layer_groups(
        shape.layers, shape.kv_heads, shape.head_dim
    )
    return group_codecs(setup.codec, setup.options, ranges, setup.groups, setup.curve)


def _warm(groups: Sequence[GroupCalibration]) -> None:
    """Fold matrices now: a process does it once, so it is no part of a page's time."""
    for group in groups:
        for bundle in group.bundles.values():
            _ = bundle.fold.forward
