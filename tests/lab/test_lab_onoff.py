"""Keys on planes, generations against each other, and the seeds' targets."""

import importlib.util

import numpy as np
import pytest

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.kept import Kept
from kvferry.codec.lab import clusters
from kvferry.codec.lab.experiment.evidence import Evidence
from kvferry.codec.lab.experiment.results import Result, Status
from kvferry.codec.lab.experiment.series import ratio_at, series_of
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.targets import targets_table
from kvferry.codec.lab.likeness import bleu, rouge_l
from kvferry.codec.rope import RopeSpec, apply, positions_of

ROPE = RopeSpec(dims=8, traditional=False, inv_freq=(1.0, 0.1, 0.01, 0.001))


def page(keys: np.ndarray, kept: Kept | None = None) -> PageTensors:
    """Layers 2 to 4, heads 0 to 2, tokens 10 to 20."""
    streams = {name: Stream(name, keys, DType.FLOAT32) for name in ("k", "v")}
    return PageTensors((2, 4), (0, 2), (10, 20), streams, kept)


def plain() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((2, 2, 10, 8)).astype(np.float32)


def test_keys_are_taken_with_rope_undone() -> None:
    keys = plain()
    rotated = np.ascontiguousarray(apply(keys, ROPE, positions_of((10, 20))))
    found = clusters.head_keys([page(rotated)], 3, 1, ROPE)
    assert found.values == pytest.approx(keys[1, 1], abs=1e-5)
    assert list(found.positions) == list(range(10, 20))
    assert set(found.weights) == {1.0}


def test_entries_of_merged_pages_have_their_own_positions_and_weights() -> None:
    keys = plain()[:, :, :3]
    positions = np.tile(np.array([10, 14, 19]), (2, 2, 1)).astype(np.int64)
    weights = np.tile(np.array([1, 9, 0], np.float32), (2, 2, 1))
    rotated = keys.copy()
    rotated[1, 0] = apply(keys[1, 0], ROPE, positions[1, 0])
    found = clusters.head_keys([page(rotated, Kept(positions, weights))], 3, 0, ROPE)
    assert found.values == pytest.approx(keys[1, 0, :2], abs=1e-5)  # of weight 0: padding
    assert (list(found.positions), list(found.weights)) == ([10, 14], [1.0, 9.0])


def test_the_plane_holds_the_directions_that_vary_most() -> None:
    rng = np.random.default_rng(1)
    wide = rng.standard_normal((200, 2)) @ np.array([[9.0, 0, 0, 0], [0, 0, 4.0, 0]])
    points = (wide + 0.01 * rng.standard_normal((200, 4))).astype(np.float32)
    exact, same, share = clusters.pca(points, points)
    assert share > 0.999
    assert exact == pytest.approx(same)
    assert exact[:, 0].std() == pytest.approx(points[:, 0].std(), rel=0.01)
    centres = points[[3, 50, 120]]
    assert list(clusters.nearest(points[[3, 120, 50]], centres)) == [0, 2, 1]


def test_a_sample_is_spread_over_all() -> None:
    keys = clusters.head_keys([page(plain())], 2, 0, None)
    assert list(keys.sample(4).positions) == [10, 13, 16, 19]
    assert len(keys.sample(100).values) == 10


@pytest.mark.long
def test_umap_lays_out_both_or_says_nothing() -> None:
    rng = np.random.default_rng(2)
    points = rng.standard_normal((40, 6)).astype(np.float32)
    assert clusters.umap(points[:5], points[:5]) is None
    if importlib.util.find_spec("umap") is None:
        assert clusters.umap(points, points) is None
        return
    found = clusters.umap(points, points[:10])
    assert found is not None
    assert (found[0].shape, found[1].shape) == ((40, 2), (10, 2))


def test_likeness_of_texts() -> None:
    said = "the capital of France is Paris and it lies on the Seine"
    assert bleu(said, said) == pytest.approx(100.0)
    assert rouge_l(said, said) == 1.0
    other = "the capital of France is Lyon and it lies on the Rhone"
    assert 0 < bleu(other, said) < 100
    assert rouge_l(other, said) == pytest.approx(10 / 12)
    assert bleu("", said) == 0.0


def result(codec: str, ratio: float, kl: float, text: str = "prose", **more: object) -> Result:
    name, _, label = codec.partition(", ")
    spec = CodecSpec(name=name, ratio=ratio, label=codec if label else "")
    metrics = {"compression_ratio": ratio, "kl_mean": kl, **more}
    run = Run(kind="fidelity", codec=spec, text=text, context=2048, continuation=256)
    return Result(run=run, digest=f"{codec}{ratio}{text}", about={"model": "m"}, metrics=metrics)


def test_a_target_is_met_or_not_or_not_measured() -> None:
    found = [
        *(result("ferry", ratio, kl) for ratio, kl in ((10, 0.002), (40, 0.012), (60, 0.03))),
        *(result("kvtc", ratio, kl) for ratio, kl in ((4, 0.004), (8, 0.02))),
        result("streaming", 4.0, 0.5),
        result("random", 4.0, 2.0),
        result("random, 4 sinks", 4.0, 0.25),
    ]
    rows = {tuple(c.strip() for c in r.split("|")[1:-1]) for r in targets_table(found)[2:]}
    told = {(row[0], row[2]): (row[3], row[4]) for row in rows}
    assert told["ferry", "ratio at KL 0.01 >= 20"][1] == "yes"
    assert told["streaming", "KL / KL of `random, 4 sinks` at 4x < 1"] == ("2", "**no**")
    assert told["streaming", "KL / KL of `random, 4 sinks` at 8x < 1"] == ("not measured", "-")
    assert told["kvtc", "ratio >= 3 where 4 is asked for"] == ("4", "yes")
    assert all(row[5] for row in rows if row[4] == "**no**")


def test_a_ratio_is_read_between_points_and_never_beyond() -> None:
    points = [(10.0, 0.001), (40.0, 0.1)]
    assert ratio_at(points, 0.01) == pytest.approx(20.0)
    assert ratio_at(points, 0.2) is None
    one = [result("ferry", *p) for p in ((10.0, 0.001), (40.0, 0.1))]
    assert Evidence(one).ratio_at_kl("ferry", 0.01) == pytest.approx(20.0)
    short = [*one, result("ferry", 10.0, 0.5, "chat")]
    assert Evidence(short).ratio_at_kl("ferry", 0.01) is None  # a text that is not known


def test_two_codecs_are_compared_where_they_differ_in_nothing_else() -> None:
    found = [
        result("centroid", 8.0, 0.5), result("random", 8.0, 0.2),
        result("centroid", 8.0, 0.1, "chat"),  # nobody to compare with
        result("random", 4.0, 0.0),
    ]  # fmt: skip
    evidence = Evidence(found)
    gained = evidence.gain("fidelity", "kl_mean", "centroid", "random", 8.0)
    assert gained == pytest.approx(0.3)
    assert evidence.gain("fidelity", "kl_mean", "centroid", "random", 4.0) is None
    assert evidence.gain("needles", "kl_mean", "centroid", "random", 8.0) is None


def test_series_are_by_codec_and_setting_over_texts() -> None:
    found = [
        result("kvtc", 8, 0.02), result("kvtc", 4, 0.01), result("kvtc", 4, 0.03, "chat"),
        result("affine", 4, 0.1),
    ]  # fmt: skip
    lost = result("affine", 16, 0.0)
    failed = Result(run=lost.run, digest="x", about={}, status=Status.OUT_OF_REACH, problem="no")
    series = series_of([*found, failed])
    assert [(s.shown, s.index, len(s.results)) for s in series] == [
        ("affine 4x", 0, 1), ("kvtc 4x", 0, 2), ("kvtc 8x", 1, 1),
    ]  # fmt: skip
    assert series[1].mean("kl_mean") == pytest.approx(0.02)
    assert series[1].mean("bleu") is None
