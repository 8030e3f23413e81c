"""What a kind of experiment measures with: one model, its texts, every codec."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from blake3 import blake3
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.lab.coding import Coded
from kvferry.codec.lab.evaluate import Prepared, Setup, coder_of, prepare
from kvferry.codec.lab.experiment.ratio import Turned, turned_to
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.forward import Done, prefill
from kvferry.codec.lab.knobs import knob_of
from kvferry.codec.lab.quantization import quantization
from kvferry.codec.lab.spoken import exact_pages, words
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import ConfigError


class KnownCalibration(Protocol):
    """A codec's calibration for the model; empty for codecs without."""

    @property
    def groups(self) -> Sequence[GroupCalibration]:
        """By layers."""

    @property
    def curve(self) -> Sequence[CurvePoint]:
        """Measured rate against KL."""

    @property
    def id(self) -> bytes:
        """Of the set; empty: none."""


Tokens = Callable[[int], Sequence[int]]
_Made = TypeVar("_Made")


@dataclass(slots=True, eq=False)
class Bench:
    """One model under measurement. Not for several threads.

    Attributes:
        loaded, model_id, shape: the model.
        texts: name -> function that gives its first n tokens, or raises ModelError.
        known: finds a codec's calibration; raises ConfigError where there is none.
    """

    loaded: LoadedModel
    model_id: bytes
    shape: ModelShape
    texts: Mapping[str, Tokens]
    known: Callable[[CodecSpec], KnownCalibration]
    _prepared: tuple[object, Prepared] | None = None
    _turned: dict[tuple[str, ...], float] = field(default_factory=dict)
    _words: dict[int, list[int]] = field(default_factory=dict)
    _kept: tuple[object, Any] | None = None
    _quantization: Mapping[str, object] | None = None

    @property
    def quantization(self) -> Mapping[str, object]:
        """See `kvferry.codec.lab.quantization`. Raises: ModelError."""
        if self._quantization is None:
            self._quantization = quantization(self.loaded)
        return self._quantization

    @property
    def model(self) -> Any:
        """The mlx-lm model."""
        return self.loaded.model

    def tokens(self, text: str, count: int) -> list[int]:
        """The first ``count`` of a text. Raises: ModelError: it has fewer; ConfigError."""
        if text not in self.texts:
            raise ConfigError("text", text, f"one of {', '.join(self.texts)}")
        return list(self.texts[text](count))

    def text_digest(self, run: Run) -> str:
        """Of the tokens that a run reads; empty for one without text. Raises: as `tokens`."""
        if not run.text:
            return ""
        size = Setup(codec="", context=run.context, continuation=run.continuation).text_tokens
        tokens = self.tokens(run.text, size)
        return blake3(b"".join(t.to_bytes(4, "little") for t in tokens)).hexdigest()[:32]

    def prepared(self, run: Run, done: Done) -> Prepared:
        """A run's text, read: exact cache, window and reference distributions.

        The last one is kept, so runs that share text and lengths should follow each other.

        Raises: ModelError, ConfigError.
        """
        key = (run.text, run.context, run.continuation)
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        self._prepared = self._kept = None  # their memory is needed for the next
        self._words.clear()
        sizes = Setup(codec="", context=run.context, continuation=run.continuation)
        tokens = self.tokens(run.text, sizes.text_tokens)
        made = prepare(self.loaded, self.model_id, tokens, run.context, run.continuation, done)
        self._prepared = key, made
        return made

    def kept(self, key: object, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gave for this key, made once while calls for it follow each other."""
        if self._kept is None or self._kept[0] != key:
            self._prepared = self._kept = None  # their memory is needed for the next
            self._kept = key, make()
        made: _Made = self._kept[1]
        return made

    def words(self, run: Run, count: int, done: Done) -> list[int]:
        """What the model goes on to say greedily with the exact cache of a run's text.

        Raises: as `prepared`.
        """
        if count not in self._words or not self.is_prepared(run):
            prepared = self.prepared(run, done)
            self._words[count] = words(prepared, exact_pages(prepared), count, done)
        return self._words[count]

    def is_prepared(self, run: Run) -> bool:
        """Whether `prepared` has nothing to do."""
        key = (run.text, run.context, run.continuation)
        return self._prepared is not None and self._prepared[0] == key

    def capture(self, tokens: Sequence[int], done: Done | None = None) -> CacheSnapshot:
        """Prefill ``tokens`` and hold on to all of them."""
        cache = make_prompt_cache(self.model)
        prefill(self.model, tokens, cache, done)
        ropes = partial(page_ropes, self.model, self.shape.page_layers)
        return adapters.snapshot(cache, len(tokens), latent=self.shape.latent, ropes=ropes)

    def coded(self, codec: CodecSpec, snapshot: CacheSnapshot, span: tuple[int, int]) -> Turned:
        """Tokens ``span`` of a snapshot through a codec and back.

        Where the codec is given by a ratio its knob is turned until the bytes of this text
        come to it; the next text begins where this one ended.

        Raises: OutOfReachError, ConfigError, CodecError.
        """
        known = self.known(codec)

        def code(options: Mapping[str, object]) -> Coded:
            setup = Setup(codec=codec.name, options=options, groups=known.groups, curve=known.curve)
            return coder_of(self.model_id, self.shape, setup).run(snapshot, span)

        if codec.ratio is None:
            return Turned(0.0, codec.options, code(codec.options))
        knob = knob_of(codec.name, known.groups)
        fixed = knob.rest(codec.options)
        key = (codec.name, codec.calibration, str(sorted(fixed.items())), f"{codec.ratio:g}")
        found = turned_to(
            knob, codec.ratio, lambda options: code({**fixed, **options}), self._turned.get(key)
        )
        self._turned[key] = found.value
        return Turned(found.value, {**fixed, **found.options}, found.coded)

    def restored(self, snapshot: CacheSnapshot, pages: Sequence[PageTensors]) -> list[Any]:
        """A cache filled with ``pages``, which cover all of the snapshot's tokens.

        Raises: ModelError.
        """
        cache = make_prompt_cache(self.model)
        snapshot.refill(cache, pages)
        return list(cache)

    def exact(self, snapshot: CacheSnapshot) -> list[Any]:
        """A cache as the snapshot was."""
        return self.restored(snapshot, [snapshot.page(snapshot.layers, (0, snapshot.tokens))])

    def setup(self, run: Run, options: Mapping[str, object]) -> Setup:
        """Of a run, with options as they were found. Raises: ConfigError."""
        known = self.known(run.codec)
        return Setup(
            codec=run.codec.name,
            options=options,
            context=run.context,
            continuation=run.continuation,
            groups=known.groups,
            curve=known.curve,
        )
