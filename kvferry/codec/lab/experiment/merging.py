"""Merging: what ``centroid`` loses, beside groups of the same sizes that chance put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvferry.codec.lab.centroid_losses import measure
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.onoff import whole
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import shown, table
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done

RATIOS = (2, 4, 8, 16, 32)
_LOSSES = ("key_loss", "value_loss", "attention_loss", "energy_loss")


@dataclass(frozen=True, slots=True)
class MergingLosses:
    """Losses of keys, values, attention and its energy, for tokens merged 2 to 32 to one."""

    name: ClassVar[str] = "merging"
    title: ClassVar[str] = "Merging by likeness and by chance"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per text and length."""
        return [
            Run(
                kind=self.name,
                codec=CodecSpec(name="centroid"),
                text=text,
                context=context,
                continuation=table.whole("queries", 64, high=1024),
                settings={"seed": table.whole("seed", 0, low=0)},
            )
            for context in table.wholes("contexts", (1024,))
            for text in table.texts("texts")
        ]

    def work(self, run: Run) -> float:
        """The text once; merging takes about as long as an eighth of it, each time."""
        return (run.context + run.continuation) * (1 + len(RATIOS) / 8)

    def measure(self, run: Run, bench: Bench, done: Done) -> Mapping[str, object]:
        """See `kvferry.codec.lab.centroid_losses`; ``points`` by ratio."""
        tokens = bench.tokens(run.text, run.context + run.continuation)
        seed = whole(run, "seed")
        found = measure(bench.loaded, tokens, run.context, ratios=RATIOS, seed=seed, done=done)
        points = {f"{point['ratio']:g}": point for point in found["points"]}
        return {"points": points, "query_tokens": found["query_tokens"]}

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """One table: each loss, of centroids and of chance."""
        head = ("tokens an entry", "keys", "values", "attention", "energy (nats)")
        rows = []
        for ratio in RATIOS:
            cells = []
            for loss in _LOSSES:
                own, chance = (_mean(results, ratio, by, loss) for by in ("centroid", "random"))
                form = ".3f" if loss == "energy_loss" else ".1%"
                cells.append(f"{shown(own, form)} / {shown(chance, form)}")
            rows.append((f"{ratio}", *cells))
        where = ", ".join(sorted({f"{r.run.text} ({r.run.context:,} tokens)" for r in results}))
        note = (
            "Centroid / groups of the same sizes at random, means over heads. Of keys "
            "(RoPE undone) and values: squared distance to the mean of the group over squared "
            "length. Of attention: the same of its answers to the queries of the tokens that "
            "follow, and how far the logarithm of the softmax's denominator moves. "
            f"On {where}."
        )
        return [*table(head, rows), "", note, ""]


def _mean(results: Sequence[Result], ratio: int, by: str, loss: str) -> float | None:
    found = [r.number("points", str(ratio), by, loss) for r in results]
    numbers = [number for number in found if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
