"""Presets of low rank: the smallest that holds, in the seed's fields, taken back by eval."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.cli.evaluate import chosen
from kvferry.cli.tune import Asked
from kvferry.codec.lab.evaluate import Setup, prepare
from kvferry.codec.lab.knobs import knob_of, lowrank_knob
from kvferry.codec.lab.lowrank import LowRankPlan, calibrate, calibration_set
from kvferry.codec.lab.lowrank_preset import fields, load, save
from kvferry.codec.lab.preset import Preset
from kvferry.codec.lab.search import last_of
from kvferry.codec.lab.stability import places, spread
from kvferry.codec.lab.tune import Bound, Tuner
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError

SEED_FIELDS = {
    "model": str,
    "rank": int,
    "target": str,
    "bits": int,
    "compression_ratio": float,
    "baseline_ppl": float,
    "compressed_ppl": float,
    "ppl_delta": float,
    "calibration_file": str,
    "head_dim": int,
    "num_layers": int,
}
SIZES = ("--context", "256", "--continuation", "64")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two texts of letters that repeat themselves."""
    folder = tmp_path_factory.mktemp("lowrank")
    (folder / "model").mkdir()
    save_model(*sharp_llama(27), folder / "model")
    for name, step in (("a", 7), ("b", 11)):
        letters = (chr(97 + (i * i + step * i // 5) % 26) for i in range(6000))
        (folder / f"{name}.txt").write_text("".join(letters))
    return folder


@pytest.mark.processes
@pytest.mark.long
def test_tune_to_preset_to_eval_and_stability(
    ok: Run, kvferry: Callable[..., Any], folder: Path
) -> None:
    model = ("--model", folder / "model")
    texts = ("--text", folder / "a.txt", "--text", folder / "b.txt")
    calibration = ("--calibration", folder / "made")
    made = ok(
        "calibrate", "--codec", "lowrank", *model, "--text", folder / "a.txt",
        "--tokens", "1024", "--out", folder / "made",
    )  # fmt: skip
    assert (made["norm"], made["empty_directions"]) == ("rmsnorm", {})
    assert made["lost_variance"]["v"]["15"] < made["lost_variance"]["v"]["8"]
    preset = folder / "preset.json"
    found = ok(
        "tune", "--codec", "lowrank", *model, *texts, *calibration, *SIZES,
        "--target-ppl-delta", "0.05", "--target", "v", "--ranks", "15,12,8,1", "--out", preset,
    )  # fmt: skip
    written = json.loads(preset.read_text())
    for name, kind in SEED_FIELDS.items():
        assert isinstance(written[name], kind), name
        assert written[name] == found[name]
    assert (written["head_dim"], written["num_layers"]) == (16, 3)
    assert written["worst_ppl_delta"] <= 0.05
    assert written["ppl_delta"] == pytest.approx(
        written["compressed_ppl"] / written["baseline_ppl"] - 1
    )
    assert (folder / written["calibration_file"]).is_file()
    assert not Path(written["calibration_file"]).is_absolute()
    # Nothing that was tried after it is smaller and holds: it is the first that did.
    *failed, best = found["tried"]
    assert all(trial["worst"] > 5 for trial in failed)
    assert best["options"] == {n: written[n] for n in ("rank", "bits", "target")}

    # Neither codec nor calibration has to be said again.
    a = ("--text", folder / "a.txt", *SIZES)
    again = ok("eval", *model, *a, "--codec", "lowrank", "--opt", f"preset={preset}")
    assert again["options"] == best["options"]
    assert again["ppl_delta_pct"] <= 5
    whole = ok("eval", *model, *a, "--preset", preset)
    assert whole["blob_bytes"] == again["blob_bytes"]
    finer = ok(
        "eval", *model, *a, "--codec", "lowrank", "--opt", f"preset={preset}", "--opt", "rank=16",
        "--opt", "bits=16",
    )  # fmt: skip
    assert finer["blob_bytes"] > again["blob_bytes"]

    spread = ok(
        "stability", *model, *texts, "--preset", preset, "--runs", "2", *SIZES, "--seed", "3"
    )
    assert len(spread["runs"]) == 4
    of = [run["kl_mean"] for run in spread["runs"]]
    kl = spread["overall"]["kl_mean"]
    assert (kl["lowest"], kl["highest"]) == (min(of), max(of))
    assert kl["mean"] == pytest.approx(sum(of) / 4)
    assert set(spread["texts"]) == {"a.txt", "b.txt"}

    other = json.loads(preset.read_text()) | {"model_id": "00" * 32}
    (folder / "other.json").write_text(json.dumps(other))
    refused = kvferry("eval", *model, *a, "--preset", folder / "other.json")
    assert refused.returncode == 2
    assert "tuned for this model" in refused.stderr


def test_a_preset_of_the_format_alone_gives_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "seed.json"
    path.write_text(
        json.dumps(
            {
                "model": "Qwen/Qwen2.5-7B",
                "rank": 120,
                "target": "v",
                "bits": 16,
                "compression_ratio": 1.03,
                "calibration_file": "kv_calib_qwen7b_r120.pt",
            }
        )
    )
    choice = chosen("lowrank", [f"preset={path}", "bits=8"], None)
    assert dict(choice.options) == {"rank": 120, "target": "v", "bits": "8"}
    assert (choice.preset, choice.calibration) == (None, None)
    assert "settings only" in capsys.readouterr().err
    chosen("lowrank", ["target=kv"], None)
    assert "measure on your model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"bits": 8}', "with a rank"),
        ('{"rank": 0}', "rank"),
        ('{"rank": 8, "target": "w"}', "one of v, k, kv"),
        ('{"kind": "kvferry/preset/1", "rank": 8}', "tune"),
    ],
)
def test_presets_that_cannot_be(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load(path)
    with pytest.raises(ConfigError, match=r"none\.json"):
        load(tmp_path / "none.json")


def test_settings_are_tried_from_the_smallest_blobs() -> None:
    knob = lowrank_knob((), [60, 56, 48], [16, 8], "v")
    sizes = [int(o["rank"]) * int(o["bits"]) for o in map(knob.options, knob.settings)]
    assert sizes == sorted(sizes, reverse=True)
    assert knob.options(0) == {"rank": 60, "bits": 16, "target": "v"}
    assert knob.options(5) == {"rank": 48, "bits": 8, "target": "v"}
    asked: list[float] = []

    def error(value: float) -> float:  # 60 directions in 8 bits are nearer than 48 in 16
        asked.append(value)
        return {5.0: 3.0, 4.0: 2.0, 3.0: 0.5}.get(value, 1.5)

    found, _ = last_of(error, knob.settings, 1.0)
    assert found is not None
    assert (knob.options(found.value)["rank"], asked) == (60, [5.0, 4.0, 3.0])
    assert last_of(error, knob.settings[:3], 1.0)[0] is None
    assert len(knob_of("lowrank").settings) == 10
    for ranks, bits in (([0], [8]), ([60], [4])):
        with pytest.raises(ConfigError):
            lowrank_knob((), ranks, bits)


def test_places_in_a_text_do_not_overlap() -> None:
    for seed in range(20):
        starts = places(1000, 200, 4, seed, "x")
        assert starts == places(1000, 200, 4, seed, "x")
        edges = [*starts, 1000]
        assert all(b - a >= 200 for a, b in itertools.pairwise(edges))
    assert len({tuple(places(1000, 200, 4, seed, "x")) for seed in range(20)}) > 10
    with pytest.raises(ConfigError, match="at least 1,200 tokens for 6 runs"):
        places(1000, 200, 6, 0, "x")
    alone = spread([2.0])
    assert (alone.mean, alone.deviation) == (2.0, 0.0)
    assert spread([1.0, 3.0]).deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked("lowrank", None, "60,x", None), "60,56,48"),
        (Asked("lowrank", None, "0", None), "rank"),
        (Asked("lowrank", "q", None, None), "one of v, k, kv"),
        (Asked("lowrank", None, None, "12"), "8, 16"),
        (Asked("affine", None, "60", None), "of --codec lowrank"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(
    asked: Asked, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=says):
        asked.knob(())
    assert not capsys.readouterr().err


def test_one_bound_and_no_more(kvferry: Callable[..., Any], tmp_path: Path) -> None:
    given = ["tune", "--codec", "lowrank", "--model", "/no", "--target-ppl-delta", "0.05"]
    done = kvferry(*given, "--out", tmp_path / "p.json", "--max-kl", "0.1")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvferry: --max-kl")
    assert "only one of them" in line


def test_a_preset_is_tuned_saved_and_read(
    tiny: LoadedModel, text: list[int], tmp_path: Path
) -> None:
    model_id, out = bytes(range(32)), tmp_path / "preset.json"
    plan = LowRankPlan(tokens=1024, sequence=512)
    made = calibrate(tiny, model_id, text[:1024], "tests", plan, lambda *_: None)
    calibration_set(made).save(tmp_path / "made", [made])
    sizes = Setup(codec="raw", context=256, continuation=64)
    texts = {
        name: prepare(tiny, model_id, text[start:][: sizes.text_tokens], 256, 64, lambda _: None)
        for name, start in (("one", 2000), ("two", 4000))
    }
    knob = lowrank_knob([made], [15, 12, 8, 1])
    tuner = Tuner(texts=texts, knob=knob, bound=Bound("ppl_delta_pct", 5.0), groups=[made])
    result = tuner.run()
    *failed, best = result.trials
    assert best is result.best
    assert all(trial.error > 5 >= best.error for trial in failed)
    assert knob.table[len(knob.table) - len(result.trials)] == best.options
    with pytest.raises(ConfigError, match=r"lowrank \(.*target=v.*\) gives .* on (one|two)"):
        dataclasses.replace(tuner, bound=Bound("kl_mean", 1e-12)).run()
    preset = Preset(
        model="tiny",
        model_id=model_id,
        codec="lowrank",
        options=best.options,
        calibration_id=calibration_set(made).id,
        metric="ppl_delta_pct",
        limit=5.0,
        compression_ratio=best.ratio,
        measured=result.measured("tiny"),
    )
    results = list(best.results.values())
    written = fields(preset, made, results, tmp_path / "made", out)
    save(written, out)
    assert {name: type(written[name]) for name in SEED_FIELDS} == SEED_FIELDS
    assert (written["head_dim"], written["num_layers"]) == (16, 3)
    worst = max(result.found.ppl_delta_pct for result in results)
    assert written["worst_ppl_delta"] == worst / 100
    found = load(out)
    assert found.preset is not None
    found.preset.check(model_id, preset.calibration_id, "x")
    assert [one["kl_mean"] for one in found.preset.measured] == [r.found.kl_mean for r in results]
    assert found.calibration == tmp_path / "made"
    assert found.options == best.options
    # Preset and calibration move together.
    (tmp_path / "moved").mkdir()
    for path in (out, tmp_path / "made"):
        path.rename(tmp_path / "moved" / path.name)
    assert load(tmp_path / "moved" / out.name).calibration == tmp_path / "moved" / "made"
