"""``kvferry bench restore`` over real processes, with a model for which it takes seconds."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from kvferry.cli import bench_restore
from kvferry.cli.output import progress
from kvferry.codec.mlx.load import LoadedModel
from kvferry.node.hooks.bench_plot import draw_restore

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.mark.long
def test_what_is_printed_and_drawn_was_restored(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (2e4, 0.0)
    monkeypatch.setattr(bench_restore, "SWEEP", rates)
    monkeypatch.setattr(bench_restore, "POLICY", "exact")
    plan = bench_restore.RestorePlanned(
        model=tiny.name,
        lengths=[300, 700],
        rounds=1,
        cold_starts=0,
        sweep_tokens=300,
        sweep_rounds=1,
        offload_tokens=300,
        offload_rounds=2,
    )
    with progress("bench restore", plan.work) as bar:
        result = bench_restore.run(tiny, plan, bar)
    assert [point["tokens"] for point in result["points"]] == [300, 700]
    for point in result["points"]:
        assert point["bytes"] > 0
        assert point["speedup"] == point["prefill_seconds"] / point["restore_seconds"]
        assert {"lookup", "fetch", "decode", "commit"} <= point["steps"].keys()
    assert result["tokens"] == 700
    sweep = result["sweep"]["points"]
    assert [point["bytes_per_s"] for point in sweep] == list(rates)
    assert sweep[0]["reasons"] == ["not_worth_it"]
    assert isinstance(result["never_slower"], bool)
    assert result["offload"]["blobs_encoded_meanwhile"] >= 0
    assert draw_restore(result, tmp_path / "restore.png") > 10_000
    assert imread(tmp_path / "restore.png").ndim == 3
