"""Needles: passkeys hidden in a text, found again or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done
from kvferry.errors import ConfigError
from kvferry.proto.keys import WINDOW_TOKENS

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.bench import Bench
    from kvferry.codec.lab.needles.measure import ReadHaystack

# Of the sentences that needles and questions are made of.
VERSION = 1
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_SEVERAL = 8
# Tokens of a question and its answer, about.
_QUESTION = 45


@dataclass(frozen=True, slots=True)
class Needles:
    """Every codec at every length and seed, and always the model's own cache (``raw``).

    Keys of its table: ``lengths`` (tokens of the haystacks), ``depths`` (0 to 1, one
    haystack with one needle for each), ``several`` (needles of one more haystack, spread
    over all depths; 0: none), ``seeds`` (how many), ``haystack`` (the text that needles are
    hidden in), ``codecs`` and ``ratios``.

    In a run ``context`` is what codecs see of a haystack, and ``continuation`` is how much
    more text there is for seeds to choose from.
    """

    name: ClassVar[str] = "needles"
    title: ClassVar[str] = "Needles"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per length, seed and codec; those of the same haystacks together."""
        text = table.text("haystack", "prose")
        depths = table.numbers("depths", _DEPTHS, high=1.0)
        several = table.whole("several", 4, low=0, high=_MAX_SEVERAL)
        if several == 1 or not (depths or several):
            raise ConfigError(f"{table.where}: several", several, "0, or 2 or more")
        lengths = table.wholes("lengths", (512, 1024, 2048), low=2 * WINDOW_TOKENS)
        seeds = table.whole("seeds", 1, high=1000)
        given = [codec for codec in table.codecs() if codec.name != "raw"]
        codecs = [CodecSpec(name="raw"), *given]
        shared = {"depths": list(depths), "several": several, "version": VERSION}
        return [
            Run(
                kind=self.name,
                codec=codec,
                text=text,
                context=length - WINDOW_TOKENS,
                continuation=length,
                settings={"length": length, "seed": seed, **shared},
            )
            for length in lengths
            for seed in range(seeds)
            for codec in codecs
        ]

    def work(self, run: Run) -> float:
        """Questions, and the haystacks where the run is the first to need them."""
        plan = _Plan.of(run)
        questions = _QUESTION * (len(plan.depths) + plan.several)
        haystacks = len(plan.depths) + (plan.several > 0)
        # The text is counted once by whoever runs this.
        return questions + (run.codec.name == "raw") * max(0, haystacks - 2) * plan.length

    def measure(self, run: Run, bench: "Bench", done: Done) -> Mapping[str, object]:
        """Each needle with its answer, and shares of all."""
        from kvferry.codec.lab.needles.measure import measure
        from kvferry.codec.lab.needles.summary import recall

        ready = bench.kept(
            (self.name, run.text, run.context, *_key(run)), lambda: _read(run, bench, done)
        )
        found, options, ratios, encoding, decoding = [], {}, [], 0.0, 0.0
        for one in ready:
            coded = one.exact()
            if run.codec.name != "raw":
                turned = bench.coded(run.codec, one.snapshot, (0, one.haystack.coded))
                coded, options = turned.coded, dict(turned.options)
            ratios.append(2 * coded.values / coded.blob_bytes)
            encoding += coded.encode_seconds
            decoding += coded.decode_seconds
            found += [r.to_json() for r in measure(bench.loaded, one, coded, done)]
        all_of_them = recall(found)
        return {
            "options": options,
            "compression_ratio": sum(ratios) / len(ratios),
            "recall": 0.0 if all_of_them is None else all_of_them.share,
            "encode_seconds": encoding,
            "decode_seconds": decoding,
            "needles": found,
        }

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """Uncompressed first, then codecs, and recall against compression."""
        from kvferry.codec.lab.needles.report import section

        return section(results, folder)


@dataclass(frozen=True, slots=True)
class _Plan:
    length: int
    seed: int
    depths: Sequence[float]
    several: int

    @classmethod
    def of(cls, run: Run) -> "_Plan":
        given = run.settings
        depths = given["depths"]
        assert isinstance(depths, list)  # noqa: S101
        return cls(
            int(str(given["length"])),
            int(str(given["seed"])),
            [float(str(depth)) for depth in depths],
            int(str(given["several"])),
        )


def _key(run: Run) -> tuple[object, ...]:
    plan = _Plan.of(run)
    return plan.length, plan.seed, tuple(plan.depths), plan.several


def _read(run: Run, bench: "Bench", done: Done) -> "list[ReadHaystack]":
    from kvferry.codec.lab.needles.haystack import make_haystack
    from kvferry.codec.lab.needles.measure import read

    plan = _Plan.of(run)
    text = bench.tokens(run.text, run.context + WINDOW_TOKENS + run.continuation)
    places = [[depth] for depth in plan.depths]
    if plan.several:
        places.append([index / (plan.several - 1) for index in range(plan.several)])
    found = []
    for depths in places:
        made = make_haystack(bench.loaded.tokenizer, text, plan.length, depths, plan.seed)
        snapshot = bench.capture(made.tokens, done)
        found.append(read(bench.loaded.tokenizer, bench.model_id, bench.shape, made, snapshot))
    return found
