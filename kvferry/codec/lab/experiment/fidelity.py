"""Fidelity: KL, perplexity, top-1, logits, K and V, and the model's own words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvferry.codec.lab.evaluate import judge
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.kind import each_codec
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.spoken import spoken, words


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Every codec at every setting on every text, at every length.

    With ``ratios`` it is a sweep. ``greedy`` tokens are generated with and without
    compression (0: none).
    """

    name: ClassVar[str] = "fidelity"
    title: ClassVar[str] = "Fidelity"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per text, length and codec; those of a text together."""
        settings = {"greedy": table.whole("greedy", 100, low=0, high=4096)}
        return each_codec(self.name, table, settings)

    def work(self, run: Run) -> float:
        """The continuation, and single tokens, which take ten times as long."""
        return run.continuation + 10 * float(str(run.settings["greedy"]))

    def measure(self, run: Run, bench: Bench, done: Done) -> Mapping[str, object]:
        """As ``kvferry eval``; ``options`` are those that a ratio was reached with."""
        prepared = bench.prepared(run, done)
        found = bench.coded(run.codec, prepared.snapshot, (0, run.context))
        setup = bench.setup(run, found.options)
        metrics = judge(prepared, setup, found.coded, done).to_json(bench.loaded.name)
        count = int(str(run.settings["greedy"]))
        if count:
            pages = [*found.coded.pages, *prepared.tail.pages]
            exact = bench.words(run, count, done)
            metrics |= spoken(exact, words(prepared, pages, count, done))
        return metrics

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """See `kvferry.codec.lab.experiment.fidelity_report`."""
        from kvferry.codec.lab.experiment.fidelity_report import fidelity_section

        return fidelity_section(results, folder)
