"""Runs write one JSON each, are not measured twice, and the report builds from the JSONs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.lab.attention import attention_difference
from kvferry.codec.lab.evaluate import Setup, measure
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.plan import load_plan
from kvferry.codec.lab.experiment.report import build_report
from kvferry.codec.lab.experiment.results import Status, load_result, load_results
from kvferry.codec.lab.experiment.runner import Outcome, run_all
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.greedy import first_difference, greedy, token_match
from kvferry.codec.lab.machine import machine
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError, ModelError, OutOfReachError

MODEL_ID = bytes(range(32))
PLAN = """
texts = ["prose", "source"]
contexts = 300
continuation = 24
[[codec]]
name = "affine"
options = { bits = 4 }
[[codec]]
name = "raw"
[[experiment]]
kind = "fidelity"
greedy = 6
[[experiment]]
kind = "fidelity"
greedy = 0
codecs = ["affine", "streaming"]
ratios = [4, 100]
texts = "prose"
[[experiment]]
kind = "onoff"
codecs = ["affine", "streaming"]
texts = "prose"
greedy = 6
umap = false
[[experiment]]
kind = "cost"
codecs = "affine"
texts = "prose"
rounds = 1
generated = 2
"""


class NoCalibration:
    groups: Sequence[Any] = ()
    curve: Sequence[Any] = ()
    id = b""


def known(codec: CodecSpec) -> NoCalibration:
    if codec.name == "ferry":
        raise ConfigError("calibration", "none", "made")
    return NoCalibration()


def silent(*_: object) -> None:
    pass


def bench_of(tiny: LoadedModel, text: list[int]) -> Bench:
    def tokens(start: int) -> Any:
        def first(count: int) -> list[int]:
            if count > 1000:
                raise ModelError("too short")
            return text[start : start + count]

        return first

    texts = {"prose": tokens(0), "source": tokens(5000)}
    return Bench(tiny, MODEL_ID, describe(tiny.model, tiny.config), texts, known)


@pytest.fixture(scope="module")
def bench(tiny: LoadedModel, text: list[int]) -> Bench:
    return bench_of(tiny, text)


def run_of(codec: CodecSpec, **more: Any) -> Run:
    given: dict[str, Any] = {
        "kind": "fidelity",
        "text": "prose",
        "context": 300,
        "continuation": 24,
        "settings": {"greedy": 0},
    }
    return Run(codec=codec, **(given | more))


@pytest.fixture(scope="module")
def folder(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plan above gives."""
    base = tmp_path_factory.mktemp("experiments")
    (base / "plan.toml").write_text(PLAN)
    out = base / "out"
    out.mkdir()
    outcome = run_all(load_plan(base / "plan.toml").runs, bench, out, silent)
    assert not outcome.failed
    assert not outcome.stopped
    return out


def test_one_json_a_run_with_all_that_is_needed_to_read_it(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    assert len(files) == 4 + 4 + 2 + 1
    for file in files:
        found = json.loads(file.read_text())
        assert {"model", "quantization", "hardware", "sinks", "window", "commit", "metrics"} <= set(
            found
        )
        assert found["run"]["context"] == 300
        assert load_result(file).to_json() == found


def test_fidelity_is_what_eval_measures(folder: Path, bench: Bench) -> None:
    run = run_of(CodecSpec(name="affine", options={"bits": 4}))
    prepared = bench.prepared(run, silent)
    setup = Setup(codec="affine", options={"bits": 4}, context=300, continuation=24)
    wanted = measure(prepared, setup, silent).to_json("tiny")
    found = next(
        r
        for r in load_results(folder)
        if (r.run.kind, r.run.text, r.run.codec) == ("fidelity", "prose", run.codec)
    )
    for name in ("blob_bytes", "kl_mean", "top1_agreement", "logit_cosine", "ppl_restored"):
        assert found.metrics[name] == pytest.approx(wanted[name], rel=1e-3), name
    assert found.number("errors", "k", "relative") > found.number("errors", "v", "mse") > 0  # type: ignore[operator]
    assert found.metrics["greedy_tokens"] == 6


def test_without_loss_nothing_is_lost(folder: Path) -> None:
    for result in load_results(folder):
        if result.run.codec.name == "raw":
            assert result.number("token_match") == 1.0
            assert result.number("errors", "k", "mse") == 0.0
            assert result.number("logit_cosine") == pytest.approx(
                1.0, abs=1e-3
            )  # the window is at 8 bits


def test_errors_are_what_their_definitions_say(bench: Bench) -> None:
    run = run_of(CodecSpec(name="affine", options={"bits": 3}))
    prepared = bench.prepared(run, silent)
    coded = bench.coded(run.codec, prepared.snapshot, (0, 300)).coded
    exact = prepared.snapshot.page((0, 3), (0, 300)).streams["k"].float32()
    own = np.concatenate([page.streams["k"].float32() for page in coded.pages], axis=2)
    setup = Setup(codec="affine", options={"bits": 3}, context=300, continuation=24)
    found = measure(prepared, setup, silent).errors["k"]
    assert found.mse == pytest.approx(float(((own - exact) ** 2).mean()), rel=1e-4)
    share = np.abs(own - exact).mean() / np.abs(exact).mean()
    assert found.relative == pytest.approx(float(share), rel=1e-4)
    layer = np.abs(own[2] - exact[2]).mean() / np.abs(exact[2]).mean()
    assert found.layers[2] == pytest.approx(float(layer), rel=1e-4)


def test_a_knob_is_turned_until_the_bytes_come_to_the_ratio(folder: Path, bench: Bench) -> None:
    asked = [r for r in load_results(folder) if r.run.codec.ratio == 4.0]
    assert {r.run.codec.name for r in asked} == {"affine", "streaming"}
    for result in asked:
        ratio = result.number("compression_ratio")
        assert ratio is not None
        assert abs(ratio / 4 - 1) < (0.2 if result.run.codec.name == "affine" else 0.08)
        assert result.metrics["options"] != {}
    with pytest.raises(OutOfReachError, match="nearest"):
        bench.coded(CodecSpec(name="affine", ratio=100.0), bench.capture([1] * 64), (0, 64))


def test_what_is_out_of_reach_is_said_and_not_tried_again(folder: Path, bench: Bench) -> None:
    found = [r for r in load_results(folder) if r.run.codec.ratio == 100.0]
    assert [r.status for r in found if r.run.codec.name == "affine"] == [Status.OUT_OF_REACH]
    again = run_all([r.run for r in load_results(folder)], bench, folder, silent)
    assert (len(again.results), again.skipped) == (0, 11)


def test_runs_that_fail_are_tried_again_and_hold_up_no_other(tmp_path: Path, bench: Bench) -> None:
    runs = [
        run_of(CodecSpec(name="ferry")),
        run_of(CodecSpec(name="affine", options={"bits": 5})),
        run_of(CodecSpec(name="raw"), context=2000),
        run_of(CodecSpec(name="raw")),
    ]
    for _ in range(2):
        outcome = run_all(runs, bench, tmp_path, silent, again=True)
        assert [result.run.codec.name for result in outcome.failed] == ["ferry", "raw", "affine"]
        assert all("\n" not in result.problem for result in outcome.failed)
    outcome = run_all(runs, bench, tmp_path, silent)
    assert (outcome.skipped, len(outcome.failed)) == (1, 3)


def test_another_calibration_or_text_is_measured_anew(
    tmp_path: Path, bench: Bench, tiny: LoadedModel, text: list[int]
) -> None:
    run = run_of(CodecSpec(name="affine", options={"bits": 8}))
    assert len(run_all([run], bench, tmp_path, silent).results) == 1
    assert run_all([run], bench, tmp_path, silent).skipped == 1
    other = bench_of(tiny, text[100:])
    assert len(run_all([run], other, tmp_path, silent).results) == 1


def test_times_are_measured_anew_on_another_machine_and_nothing_else_is(
    folder: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    runs = load_plan(tmp_path / "plan.toml").runs
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    here = machine()
    updated = {**here, "system": "Another 1.0", "python": "3.99"}
    monkeypatch.setattr("kvferry.codec.lab.experiment.runner.machine", lambda: updated)
    assert not run_all(runs, bench, out, silent).results
    other = {**here, "processor": "Another"}
    monkeypatch.setattr("kvferry.codec.lab.experiment.runner.machine", lambda: other)
    again = run_all(runs, bench, out, silent)
    assert [result.run.kind for result in again.results] == ["cost"]
    assert len(list(out.glob("cost-*.json"))) == 2


def test_it_stops_between_runs_and_goes_on_from_there(tmp_path: Path, bench: Bench) -> None:
    runs = [run_of(CodecSpec(name="affine", options={"bits": bits})) for bits in (8, 4)]

    def stopping() -> bool:
        return bool(list(tmp_path.glob("*.json")))

    first: Outcome = run_all(runs, bench, tmp_path, silent, stopping=stopping)
    assert (len(first.results), first.stopped) == (1, True)
    second = run_all(runs, bench, tmp_path, silent)
    assert (len(second.results), second.skipped, second.stopped) == (1, 1, False)


def test_a_report_is_built_from_the_files_alone(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    build_report(load_results(folder), path)
    text = path.read_text()
    pictures = [part.split(")")[0] for part in text.split("](")[1:] if ".png)" in part]
    assert {"report_rate.png", "report_mse.png", "report_attention.png"} <= set(pictures)
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "affine bits=4" in text
    assert "not measured" in text  # targets of codecs that were not run
    assert "the nearest is" in text  # what is out of reach


def test_missing_data_is_said(folder: Path, tmp_path: Path) -> None:
    some = [r for r in load_results(folder) if r.run.kind == "cost"]
    build_report(some, tmp_path / "report.md")
    assert "Nothing of kind `fidelity` was measured." in (tmp_path / "report.md").read_text()
    with pytest.raises(ConfigError, match="results"):
        build_report([], tmp_path / "report.md")


def test_the_newest_of_a_run_counts(folder: Path, tmp_path: Path) -> None:
    old = next(r for r in load_results(folder) if r.run.kind == "cost")
    metrics = {**old.metrics, "compression_ratio": 77.7}
    new = replace(old, metrics=metrics, about={**old.about, "date": "2999"})
    build_report([old, new], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "77.7x" in text
    assert text.count("affine bits=4") == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "kvferry/experiment/1"}', "[" * 5000, "null"]
)
def test_a_file_that_is_none_of_ours_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_results(tmp_path)
    assert "x.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_load_that_is_no_number_is_none_of_ours(folder: Path, tmp_path: Path) -> None:
    path = min(folder.glob("*.json"))
    (tmp_path / "x.json").write_text(json.dumps({**json.loads(path.read_text()), "load": "much"}))
    with pytest.raises(ConfigError, match=r"x\.json"):
        load_results(tmp_path)


def test_greedy_words_are_the_likeliest_one_by_one(tiny: LoadedModel, tokens: list[int]) -> None:
    cache = make_prompt_cache(tiny.model)
    prefill(tiny.model, tokens[:50], cache)
    found = greedy(tiny.model, cache, tokens[50], 5)
    told = list(tokens[:51])
    for token in found:
        import mlx.core as mx

        assert int(np.argmax(np.array(tiny.model(mx.array([told]))[0, -1]))) == token
        told.append(token)
    assert token_match([1, 2, 3, 4], [1, 2, 4, 4]) == 0.75
    assert token_match([], []) == 1.0
    assert (first_difference([1, 2, 3], [1, 3, 3]), first_difference([1], [1, 2])) == (1, 1)


def test_attention_differs_where_caches_do(bench: Bench, tokens: list[int]) -> None:
    held = bench.capture(tokens[:100])
    same = attention_difference(bench.model, bench.exact(held), bench.exact(held), tokens[100:110])
    assert same == [0.0, 0.0, 0.0]
    coarse = bench.coded(CodecSpec(name="affine", options={"bits": 2}), held, (0, 100)).coded
    off = bench.restored(held, coarse.pages)
    other = attention_difference(bench.model, bench.exact(held), off, tokens[100:110])
    assert all(value > 0.01 for value in other)


def test_results_do_not_say_where_home_is(tmp_path: Path, bench: Bench) -> None:
    def at_home(codec: CodecSpec) -> NoCalibration:
        raise ConfigError("calibration", str(Path.home() / "cache"), "made")

    other = Bench(bench.loaded, MODEL_ID, bench.shape, bench.texts, at_home)
    (failed,) = run_all([run_of(CodecSpec(name="affine"))], other, tmp_path, silent).failed
    assert "~/cache" in failed.problem
    assert str(Path.home()) not in (tmp_path / failed.file_name).read_text()
