"""On and off: what the model says, where it looks and what its keys are, with and without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvferry.codec.base import PageTensors
from kvferry.codec.lab import clusters
from kvferry.codec.lab.attention import attention_difference
from kvferry.codec.lab.compare import loss_of
from kvferry.codec.lab.evaluate import Prepared
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.kind import each_codec
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.likeness import bleu, check_lab, rouge_l
from kvferry.codec.lab.spoken import spoken, words
from kvferry.codec.mlx.rope import page_ropes

# Tokens over which attention is compared, and keys that are drawn.
_LOOKED_AT = 32
_DRAWN = 300


@dataclass(frozen=True, slots=True)
class OnOff:
    """Generations of ``greedy`` tokens with and without compression (seed of MP-KVM).

    BLEU and ROUGE-L of the one against the other, the perplexity of both under the exact
    cache, the difference that attention comes to by layer, and the keys of one head
    (``layer``, ``head``; the middle layer's first by default) on a plane, that of UMAP too
    unless ``umap`` is false or the package is not there.
    """

    name: ClassVar[str] = "onoff"
    title: ClassVar[str] = "With and without compression"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per text, length and codec."""
        check_lab()
        settings: dict[str, object] = {
            "greedy": table.whole("greedy", 100, low=1, high=4096),
            "layer": table.whole("layer", -1, low=-1, high=4096),
            "head": table.whole("head", 0, low=0, high=4096),
            "umap": table.flag("umap", True),
        }
        return each_codec(self.name, table, settings)

    def work(self, run: Run) -> float:
        """Single tokens take ten times as long as tokens together."""
        return 10.0 * whole(run, "greedy") + 4 * _LOOKED_AT

    def measure(self, run: Run, bench: Bench, done: Done) -> Mapping[str, object]:
        """See the class."""
        prepared = bench.prepared(run, done)
        found = bench.coded(run.codec, prepared.snapshot, (0, run.context))
        pages = [*found.coded.pages, *prepared.tail.pages]
        metrics = {
            "options": dict(found.options),
            "compression_ratio": found.ratio,
            **_generations(prepared, bench, run, pages, done),
        }
        fed = prepared.reference[0].fed[:_LOOKED_AT]
        metrics["attention_difference"] = attention_difference(
            bench.model,
            bench.exact(prepared.snapshot),
            bench.restored(prepared.snapshot, pages),
            fed,
        )
        done(2 * _LOOKED_AT)
        metrics["keys"] = _keys(prepared, bench, run, found.coded.pages)
        return metrics

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """See `kvferry.codec.lab.experiment.onoff_report`."""
        from kvferry.codec.lab.experiment.onoff_report import onoff_section

        return onoff_section(results, folder)


def whole(run: Run, name: str) -> int:
    """A setting."""
    return int(str(run.settings[name]))


def _generations(
    prepared: Prepared, bench: Bench, run: Run, pages: Sequence[PageTensors], done: Done
) -> dict[str, Any]:
    count, first = whole(run, "greedy"), prepared.reference[0].fed[0]
    off = bench.words(run, count, done)
    on = words(prepared, pages, count, done)
    perplexity = {
        name: float(np.exp(loss_of(bench.model, bench.exact(prepared.snapshot), [first, *said])))
        for name, said in (("off", off), ("on", on))
    }
    texts = {name: bench.loaded.tokenizer.decode(said) for name, said in (("off", off), ("on", on))}
    return {
        **spoken(off, on),
        "bleu": bleu(texts["on"], texts["off"]),
        "rouge_l": rouge_l(texts["on"], texts["off"]),
        "ppl_off": perplexity["off"],
        "ppl_on": perplexity["on"],
        "text_off": texts["off"],
        "text_on": texts["on"],
    }


def _keys(
    prepared: Prepared, bench: Bench, run: Run, pages: Sequence[PageTensors]
) -> dict[str, object]:
    """Two planes of one head's keys; empty for caches that have none."""
    stream = bench.shape.streams.get("k")
    if stream is None:
        return {}
    layer, head = whole(run, "layer"), whole(run, "head")
    layer = bench.shape.layers // 2 if layer < 0 else min(layer, bench.shape.layers - 1)
    head = min(head, stream.heads - 1)
    rope = page_ropes(bench.model, bench.shape.page_layers)[layer] if stream.rotated else None
    layers = (layer, layer + 1)
    exact = clusters.head_keys(
        [prepared.snapshot.page(layers, (0, run.context))], layer, head, rope
    )
    restored = clusters.head_keys(pages, layer, head, rope)
    shown, own = exact.sample(_DRAWN), restored.sample(_DRAWN)
    first, second, share = clusters.pca(shown.values, own.values)
    planes = {"pca": _plane(first, second)}
    laid = clusters.umap(shown.values, own.values) if run.settings["umap"] else None
    if laid is not None:
        planes["umap"] = _plane(*laid)
    return {
        "layer": layer,
        "head": head,
        "tokens": len(exact.values),
        "entries": len(restored.values),
        "weights": [round(float(w), 3) for w in own.weights],
        "cluster": clusters.nearest(shown.values, own.values).tolist(),
        "pca_share": share,
        "planes": planes,
    }


def _plane(exact: clusters.Plane, restored: clusters.Plane) -> dict[str, object]:
    return {"exact": exact.round(4).tolist(), "restored": restored.round(4).tolist()}
