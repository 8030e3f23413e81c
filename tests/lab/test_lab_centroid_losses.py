"""Merging by likeness beside merging by chance, with a model's own queries."""

from pathlib import Path

import mlx.core as mx
import pytest

from kvferry.cli.lab_input import Known
from kvferry.codec.base import drops_tokens
from kvferry.codec.lab.centroid_losses import measure, recorded_queries
from kvferry.codec.lab.coding import Coder, GroupSource, group_codecs
from kvferry.codec.lab.evaluate import measure as evaluated
from kvferry.codec.lab.evaluate import prepare
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.registry import KINDS
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import CodecSpec
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError

MODEL_ID = bytes(range(32))


def test_likeness_beats_chance_and_more_is_lost_at_higher_ratios(
    tiny: LoadedModel, tokens: list[int]
) -> None:
    ran: list[int] = []
    found = measure(tiny, tokens[:330], 300, ratios=(2, 8), done=ran.append)
    assert sum(ran) == 330
    two, eight = found["points"]
    assert two["entries"] <= 150
    assert eight["entries"] <= 38
    for point in (two, eight):
        for loss in ("key_loss", "energy_loss", "attention_loss"):
            assert 0 < point["centroid"][loss] < point["random"][loss]
    assert two["centroid"]["key_loss"] < eight["centroid"]["key_loss"]
    assert two["centroid"]["attention_loss"] < eight["centroid"]["attention_loss"]
    with pytest.raises(ConfigError, match="context"):
        measure(tiny, tokens[:300], 300)


def test_queries_are_those_of_every_layer_and_attention_is_put_back(tiny: LoadedModel) -> None:
    with recorded_queries(tiny.model) as seen:
        tiny.model(mx.array([[1, 2, 3]]))
    assert [q.shape for q in seen] == [(1, 4, 3, 16)] * 3
    tiny.model(mx.array([[1, 2, 3]]))
    assert len(seen) == 3


def test_eval_measures_centroid_on_whole_contexts(tiny: LoadedModel, tokens: list[int]) -> None:
    """The coder tells it how keys rotate; nothing but the model is needed."""
    prepared = prepare(tiny, MODEL_ID, tokens[: 300 + 128 + 41], 300, 40, lambda _: None)
    found = {}
    for ratio in (1, 2, 16):
        options = {"ratio": ratio, "window": 32}
        setup = prepared.setup("centroid", options)
        found[ratio] = evaluated(prepared, setup, lambda _: None)
        assert found[ratio].pages.blob_bytes < 1.3 * 2 * found[ratio].pages.values / ratio + 9000
    assert found[1].found.kl_mean < 0.01  # of the tail, and of halves
    assert found[1].found.kl_mean < found[2].found.kl_mean
    codecs = group_codecs("centroid", {"ratio": 2}, [(0, 3)])
    assert all(drops_tokens(codec) for codec in codecs.values())
    coder = Coder(MODEL_ID, codecs, GroupSource(), prepared.shape.kv_heads)
    (page,) = coder.run(prepared.snapshot, (0, 300)).pages
    assert page.kept is not None
    assert page.kept.weights is not None
    assert page.kept.weights.sum(axis=2).tolist() == [[300.0] * 2] * 3


def test_an_experiment_reports_both_side_by_side(
    tiny: LoadedModel, tokens: list[int], tmp_path: Path
) -> None:
    kind = KINDS["merging"]
    table = Table("experiment", {"texts": ["license"], "contexts": 200, "queries": 20})
    (run,) = kind.runs(table)
    table.finish()
    shape = describe(tiny.model, tiny.config)
    bench = Bench(tiny, MODEL_ID, shape, {"license": lambda n: tokens[:n]}, lambda _: Known())
    metrics = kind.measure(run, bench, lambda _: None)
    result = Result(run=run, digest="0" * 32, about={}, metrics=metrics)
    for ratio in (2, 8):
        own, chance = (
            result.number("points", str(ratio), by, "attention_loss")
            for by in ("centroid", "random")
        )
        assert own is not None
        assert chance is not None
        assert 0 < own < chance
    lines = kind.section([result], tmp_path)
    assert any(line.startswith("| 32 |") and "/" in line for line in lines)
    assert "license (200 tokens)" in "".join(lines)


def test_what_a_bench_captured_can_be_merged(tiny: LoadedModel, tokens: list[int]) -> None:
    shape = describe(tiny.model, tiny.config)
    bench = Bench(tiny, MODEL_ID, shape, {}, lambda _: Known())
    snapshot = bench.capture(tokens[:120])
    spec = CodecSpec(name="centroid", options={"ratio": 4, "window": 8})
    found = bench.coded(spec, snapshot, (0, 120))
    assert found.coded.pages[0].entries <= 30
    assert bench.restored(snapshot, found.coded.pages)[0].offset == 120
