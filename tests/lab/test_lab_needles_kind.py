"""Needles as a kind of experiment: runs, what they share, results and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.evidence import Evidence
from kvferry.codec.lab.experiment.needles import Needles
from kvferry.codec.lab.experiment.results import Result, Status
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.needles.plot import Part
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError

KIND = Needles()
OFFERED = {"affine": [CodecSpec(name="affine", options={"bits": bits}) for bits in (8, 2)]}


def table(**values: object) -> Table:
    return Table("here", values, {}, OFFERED)


@pytest.fixture
def bench(tiny: LoadedModel) -> Bench:
    def text(count: int) -> Sequence[int]:
        return [1 + i * i % 90 for i in range(count)]

    nothing = SimpleNamespace(groups=(), curve=(), id=b"")
    shape = describe(tiny.model, tiny.config)
    return Bench(tiny, bytes(32), shape, {"prose": text}, lambda _: nothing)


def test_runs_begin_with_the_models_own_cache_and_share_haystacks() -> None:
    made = table(lengths=[512, 1024], seeds=2, depths=[0.0, 1.0], several=0)
    runs = KIND.runs(made)
    made.finish()
    assert len(runs) == 2 * 2 * 3
    assert [r.codec.name for r in runs[:3]] == ["raw", "affine", "affine"]
    assert [r.settings["seed"] for r in runs[:6]] == [0, 0, 0, 1, 1, 1]
    assert {r.context for r in runs} == {384, 896}
    assert len({r.digest({}) for r in runs}) == len(runs)
    assert runs[0].digest({}) == KIND.runs(table(lengths=[512], several=0, depths=[0, 1]))[
        0
    ].digest({})


@pytest.mark.parametrize(
    "values", [{"several": 1}, {"depths": [1.5]}, {"lengths": [100]}, {"depths": [], "several": 0}]
)
def test_what_cannot_be_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="here"):
        KIND.runs(table(**values))


def run_all(bench: Bench, runs: Sequence[Run]) -> list[Result]:
    about = {"model": "tiny", "date": "2026-01-01"}
    return [
        Result(run=r, digest=r.digest({}), about=about, metrics=KIND.measure(r, bench, fed.append))
        for r in runs
        for fed in [[]]
    ]


def test_a_haystack_is_read_once_for_all_codecs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Bench.capture

    def capture(self: Bench, tokens: Sequence[int], done: object = None) -> object:
        read.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(Bench, "capture", capture)
    runs = KIND.runs(table(lengths=[900], depths=[0.2, 0.8], several=3))
    results = run_all(bench, runs)
    assert read == [900] * 3
    raw, fine, coarse = (result.metrics["needles"] for result in results)
    assert [n["needles"] for n in raw] == [1, 1, 3, 3, 3]
    assert [n["key"] for n in raw] == [n["key"] for n in coarse]
    gaps = [
        sum(abs(a["log_prob"] - b["log_prob"]) for a, b in zip(raw, own, strict=True))
        for own in (fine, coarse)
    ]
    assert 0 < gaps[0] < gaps[1]
    assert results[0].metrics["compression_ratio"] == 1.0
    assert (
        1.5 < results[1].metrics["compression_ratio"] < 3 < results[2].metrics["compression_ratio"]
    )


def needle(
    exact: bool, depth: float, needles: int = 1, length: int = 512, log_prob: float = -0.6
) -> dict[str, object]:
    return {
        "length": length,
        "depth": depth,
        "needles": needles,
        "name": "willow",
        "key": f"{depth}",
        "ratio": 4.0,
        "kept": 1.0,
        "exact": exact,
        "log_prob": log_prob,
        "tokens": 6,
        "said": " 1",
    }


def result(
    codec: CodecSpec, found: Sequence[bool], model: str = "tiny", several: int = 4
) -> Result:
    needles = [needle(exact, depth) for exact, depth in zip(found, (0.0, 0.5, 1.0), strict=False)]
    settings = {"seed": 0, "several": several}
    run = Run(kind="needles", codec=codec, text="prose", context=384, settings=settings)
    metrics = {"compression_ratio": 4.0, "needles": needles}
    return Result(run=run, digest="0" * 32, about={"model": model}, metrics=metrics)


def test_the_report_judges_a_codec_by_what_the_model_finds_itself(tmp_path: Path) -> None:
    results = [
        result(CodecSpec(name="raw"), [True, True, False]),
        result(CodecSpec(name="affine"), [True, True, True]),  # measured again below
        result(CodecSpec(name="affine"), [True, False, True]),
    ]
    lines = "\n".join(KIND.section(results, tmp_path))
    assert "| 512 | 1/1 | 1/1 | 0/1 | 67 %" in lines
    # One needle of the two that the model finds; the third it does not, whatever the codec.
    assert "| affine | 4.0 | 2/3 | 1/1 0/1 1/1 |  | 50 % (9-91) | +0.000 | 100 % |" in lines
    picture = tmp_path / "needles.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "(needles.png)" in lines


def test_a_needle_of_two_plans_counts_once(tmp_path: Path) -> None:
    results = [
        result(CodecSpec(name="raw"), [True, True, True]),
        result(CodecSpec(name="affine"), [True, False, True]),
        result(CodecSpec(name="affine"), [True, False], several=0),
    ]
    lines = "\n".join(KIND.section(results, tmp_path))
    assert "| affine | 4.0 | 2/3 | 1/1 0/1 1/1 |" in lines


def test_the_report_says_what_is_missing(tmp_path: Path) -> None:
    far = CodecSpec(name="affine", ratio=99.0)
    run = Run(kind="needles", codec=far, text="prose", context=384, settings={"seed": 0})
    missing = Result(
        run=run, digest="", about={"model": "tiny"}, status=Status.OUT_OF_REACH, problem="too far"
    )
    lines = "\n".join(KIND.section([missing], tmp_path))
    assert "Not measured without compression" in lines
    assert not list(tmp_path.iterdir())
    both = [
        result(CodecSpec(name="raw"), [False]),
        result(CodecSpec(name="affine"), [False]),
        missing,
    ]
    lines = "\n".join(KIND.section(both, tmp_path))
    assert "fails mostly by itself" in lines


def long_and_short(
    codec: CodecSpec, found: Mapping[int, Sequence[bool]], nats: float
) -> list[Result]:
    """A result for each length; in long texts a key is a nat per token less likely."""
    made = []
    for length, own in found.items():
        hard = float(length > 512)
        needles = [
            needle(exact, depth, length=length, log_prob=6 * (nats - hard))
            for exact, depth in zip(own, (0.0, 0.25, 0.5, 0.75, 1.0), strict=False)
        ]
        run = Run(
            kind="needles",
            codec=codec,
            text="prose",
            context=length - 128,
            settings={"seed": 0, "several": 0, "depths": len(own)},
        )
        about = {"model": "tiny"}
        made.append(Result(run=run, digest="", about=about, metrics={"needles": needles}))
    return made


ALL = [True] * 5
FINE, COARSE, ELSEWHERE = (CodecSpec(name="affine", options={"bits": n}) for n in (8, 4, 2))
UNEVEN = [
    *long_and_short(CodecSpec(name="raw"), {512: ALL, 1024: ALL, 4096: [False] * 5}, -0.1),
    *long_and_short(FINE, {512: ALL, 4096: [False] * 5}, -0.11),
    *long_and_short(CodecSpec(name="kvtc"), {512: ALL, 4096: [False] * 5}, -0.15),
    *long_and_short(COARSE, {512: [True, False]}, -0.3),
    *long_and_short(ELSEWHERE, {1024: [False]}, -2.0),
]


def test_settings_are_compared_on_the_same_needles_only(tmp_path: Path) -> None:
    lines = KIND.section(UNEVEN, tmp_path)
    wide = lines.index(
        "On the same 10 needles at 512 and 4,096 tokens, 5 of which the model finds with its own "
        "cache:"
    )
    narrow = lines.index(
        "On the same 2 needles at 512 tokens, 2 of which the model finds with its own cache:"
    )
    # The coarse one was spared the long text; no figure of it stands beside those of both.
    rows = [line.split(" | ")[0].strip("| ") for line in lines[wide + 4 : narrow] if line]
    assert rows == ["affine bits=8", "kvtc"]
    rows = [line for line in lines[narrow + 4 : narrow + 7] if line]
    assert [row.split(" | ")[-2] for row in rows] == ["-0.010", "-0.200", "-0.050"]
    assert [row.split(" | ")[-3][:5] for row in rows] == ["100 %", "50 % ", "100 %"]
    assert "Measured on other needles only: affine bits=2 (4.0x, 0/1 at 1,024 tokens)." in lines


def test_the_picture_has_a_part_for_each_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Part] = []
    monkeypatch.setattr(
        "kvferry.codec.lab.needles.report.draw_recall", lambda parts, *_: drawn.extend(parts)
    )
    KIND.section(UNEVEN, tmp_path)
    assert [part.told for part in drawn] == [
        "5 of 10 needles at 512 and 4,096 tokens",
        "2 of 2 needles at 512 tokens",
    ]
    for part in drawn:
        asked = {point.recall.asked for curve in part.curves for point in curve.points}
        assert asked == {part.exact.asked}
    assert [(c.codec, len(c.points)) for c in drawn[1].curves] == [("affine", 2), ("kvtc", 1)]


def test_targets_weigh_needles_not_runs() -> None:
    def at(found: Mapping[int, Sequence[bool]], name: str) -> list[Result]:
        return long_and_short(CodecSpec(name=name, ratio=8.0), found, -0.1)

    evidence = Evidence(
        [
            *at({512: [True], 1024: [True] * 5}, "centroid"),
            *at({512: [False], 1024: [True] * 5}, "streaming"),
        ]
    )
    assert evidence.found_gain("centroid", "streaming", 8.0) == pytest.approx(1 / 6)
    assert evidence.found_gain("centroid", "random", 8.0) is None


def test_what_merging_left_is_told_only_where_it_was_counted_right(tmp_path: Path) -> None:
    plain, merged = CodecSpec(name="streaming"), CodecSpec(name="centroid")
    results = [result(CodecSpec(name="raw"), [True]), result(plain, [True]), result(merged, [True])]

    def last(lines: Sequence[str]) -> dict[str, str]:
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        return {row[0]: row[-1] for row in rows}

    old = last(KIND.section(results, tmp_path))
    assert (old["streaming"], old["centroid"]) == ("100 %", "-")
    new = {**needle(True, 0.0), "alone": 0.25}
    again = replace(results[-1], metrics={"needles": [new]})
    assert last(KIND.section([*results[:2], again], tmp_path))["centroid"] == "25 %"
