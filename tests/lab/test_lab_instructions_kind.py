"""Instruction memory as a kind of experiment: conditions, memories, results and the report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.lab.chat_frame import ChatFrame
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.instructions import Instructions
from kvferry.codec.lab.experiment.plan import load_plan
from kvferry.codec.lab.experiment.results import Result, Status
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.instructions.conditions import memory_for
from kvferry.codec.lab.instructions.converse import converse, say, turn_tokens
from kvferry.codec.lab.instructions.examples import Example, Turn
from kvferry.codec.lab.instructions.memory import entries
from kvferry.codec.lab.instructions.rules import Rule
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError

KIND = Instructions()
FRAME = ChatFrame([1, 2], [3], [4, 5])
LONG = "Something that is said at some length, and of no use to anybody."
EXAMPLE = Example(
    "one",
    "reminder",
    (Turn("I am Ann.", LONG), Turn("Tea?", LONG), Turn("Rain?", LONG)),
    "Who am I?",
    (Rule("min_words", 1),),
)
OFFERED = {name: [CodecSpec(name=name)] for name in ("streaming", "random")}


def table(**values: object) -> Table:
    return Table("here", values, {}, OFFERED)


@pytest.fixture
def bench(tiny: LoadedModel) -> Bench:
    nothing = SimpleNamespace(groups=(), curve=(), id=b"")
    return Bench(tiny, bytes(32), describe(tiny.model, tiny.config), {}, lambda _: nothing)


def test_conditions_are_the_same_retentions_of_every_codec_and_two_to_compare_with() -> None:
    made = table(ratios=[2, 4])
    runs = KIND.runs(made)
    made.finish()
    assert [(r.codec.name, r.codec.ratio, r.settings["told"]) for r in runs] == [
        ("raw", None, True),
        ("raw", None, False),
        ("streaming", 2.0, True),
        ("streaming", 4.0, True),
        ("random", 2.0, True),
        ("random", 4.0, True),
    ]
    assert len({r.digest({}) for r in runs}) == len(runs)
    assert [r.settings["told"] for r in KIND.runs(table(untold=False, codecs="random"))] == [
        True
    ] * 2


def test_other_examples_are_other_runs() -> None:
    said = {
        KIND.runs(table(**values))[0].settings["said"]
        for values in ({}, {"kinds": ["conflict"]}, {"examples": 3})
    }
    assert len(said) == 3
    with pytest.raises(ConfigError, match="kinds"):
        KIND.runs(table(kinds=["riddle"]))


@pytest.mark.parametrize("name", ["streaming", "random"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_codecs_that_drop_tokens_hold_the_same_share_after_every_turn(
    bench: Bench, name: str, positions: str
) -> None:
    spec = CodecSpec(name=name, ratio=4.0, options={"positions": positions})
    memory, held = memory_for(spec, bench), []

    class Watching:
        share = 1.0

        def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
            made = memory.after_turn(cache, tokens)
            held.append((entries(made), tokens))
            return made

    converse(bench.loaded, FRAME, EXAMPLE, Watching(), limit=4)
    assert len(held) == 3
    for count, tokens in held:
        assert count == round(tokens / 4)
    assert memory.share == held[-1][0] / held[-1][1]


def test_each_conversation_draws_lots_of_its_own_unless_a_seed_is_given(bench: Bench) -> None:
    cache = make_prompt_cache(bench.model)
    prefill(bench.model, turn_tokens(bench.loaded, FRAME, EXAMPLE)[0], cache)
    count = cache[0].offset

    def kept(conversation: str, **options: object) -> list[int]:
        spec = CodecSpec(name="random", ratio=2.0, options={"positions": "original", **options})
        made = memory_for(spec, bench, conversation).after_turn(cache, count)
        return [int(place) for place in made[0].positions]

    assert kept("one") == kept("one") != kept("two")
    assert kept("one", seed=5) == kept("two", seed=5)


def test_the_default_set_measures_no_condition_twice_and_keeps_options() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "experiments"
    runs = load_plan(folder / "instructions.toml").runs
    assert len({run.digest({}) for run in runs}) == len(runs) == 7
    sinks = {run.codec.label: run.codec.options for run in runs if "sinks" in run.codec.label}
    assert sinks == {"random, 4 sinks": {"sinks": 4}, "streaming, 64 sinks": {"sinks": 64}}


def test_without_ratio_a_codec_keeps_what_its_options_say(bench: Bench) -> None:
    spec = CodecSpec(name="streaming", options={"sinks": 4, "window": 20})
    memory = memory_for(spec, bench)
    found = converse(bench.loaded, FRAME, EXAMPLE, memory, limit=4)
    assert found.share == 24 / found.tokens


def test_everything_kept_is_nothing_forgotten(bench: Bench) -> None:
    whole = converse(bench.loaded, FRAME, EXAMPLE, memory_for(CodecSpec(name="raw"), bench))
    spec = CodecSpec(name="streaming", ratio=1.0)
    assert converse(bench.loaded, FRAME, EXAMPLE, memory_for(spec, bench)).answer == whole.answer


def test_other_codecs_code_every_token_once_and_none_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded: list[tuple[int, int]] = []
    plain = Bench.coded

    def watched(self: Bench, codec: CodecSpec, held: Any, span: tuple[int, int]) -> Any:
        coded.append(span)
        return plain(self, codec, held, span)

    monkeypatch.setattr(Bench, "coded", watched)
    turns = turn_tokens(bench.loaded, FRAME, EXAMPLE)
    ends = [sum(map(len, turns[: i + 1])) for i in range(3)]
    memory = memory_for(CodecSpec(name="affine", options={"bits": 8}), bench)
    found = converse(bench.loaded, FRAME, EXAMPLE, memory, limit=6)
    assert coded == [(0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2])]
    assert 0.5 < found.share < 0.7  # 8.5 bits of 16, and headers of small pages
    exact = memory_for(CodecSpec(name="zstd"), bench)
    cache = make_prompt_cache(bench.model)
    prefill(bench.model, [token for turn in turns[:3] for token in turn], cache)
    wanted = say(bench.loaded, cache, turns[3], 6)
    answer = converse(bench.loaded, FRAME, EXAMPLE, exact, limit=6).answer
    assert answer == bench.loaded.tokenizer.decode(wanted)


def test_a_run_measures_the_examples_that_it_names(bench: Bench) -> None:
    run = KIND.runs(table(kinds=["conflict"], examples=2, answer_tokens=3, ratios=[4]))[2]
    fed: list[int] = []
    metrics = KIND.measure(run, bench, fed.append)
    assert [example["kind"] for example in metrics["examples"]] == ["conflict"] * 2
    assert metrics["low"] <= metrics["accuracy"] <= metrics["high"]
    assert 0.2 < metrics["share"] < 0.3
    assert sum(fed) > sum(example["tokens"] for example in metrics["examples"])


def test_the_first_turn_is_read_once_for_all_conditions(bench: Bench) -> None:
    runs = KIND.runs(table(kinds=["conflict"], examples=1, answer_tokens=2, codecs="random"))
    first, again = [], []
    found = [KIND.measure(runs[0], bench, fed.append) for fed in (first, again)]
    assert found[0] == found[1]
    assert sum(first) > sum(again)
    assert first[1:] == again


def result(
    codec: CodecSpec, right: Sequence[bool], share: float = 1.0, *, told: bool = True, **about: str
) -> Result:
    kinds = ("reminder", "conflict")
    examples = [
        {"name": f"e{i}", "kind": kinds[i % 2], "right": good, "share": share, "tokens": 9}
        for i, good in enumerate(right)
    ]
    run = Run(kind="instructions", codec=codec, settings={"told": told, "said": "s"})
    metrics = {"share": share, "examples": examples}
    return Result(run=run, digest="0" * 32, about={"model": "tiny"} | about, metrics=metrics)


def test_the_report_compares_pairs_and_counts_what_was_known(tmp_path: Path) -> None:
    half = CodecSpec(name="streaming", ratio=2.0)
    results = [
        result(CodecSpec(name="raw"), [True, True, True, False]),
        result(CodecSpec(name="raw", label="untold"), [False] * 4, told=False),
        result(half, [True, True, True, True], 0.5),  # measured again below
        result(half, [True, False, False, True], 0.5),
    ]
    lines = "\n".join(KIND.section(results, tmp_path))
    assert "75 % (30-95) of its tests" in lines
    assert "reminder 2/2, conflict 1/2" in lines
    assert "| uncompressed | 100 % | 75 % (30-95) |  | 3/3 | 2/2 | 1/2 |" in lines
    assert "| streaming 2x | 50 % | 50 % (15-85) | -25 (" in lines
    assert "| 1/3 | 1/2 | 1/2 |" in lines
    assert "| never told | - | 0 % (0-49) |" in lines
    assert (tmp_path / "instructions.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_model_guesses_untold_cannot_be_forgotten(tmp_path: Path) -> None:
    results = [
        result(CodecSpec(name="raw"), [True, True, True, False]),
        result(CodecSpec(name="raw", label="untold"), [True, False, False, False], told=False),
        result(CodecSpec(name="random", ratio=2.0), [True, False, True, False], 0.5),
    ]
    lines = "\n".join(KIND.section(results, tmp_path))
    assert "The other 2 can show" in lines
    cells = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
    still = {row[1]: row[5] for row in cells if len(row) > 5}
    assert (still["random 2x"], still["uncompressed"], still["never told"]) == ("1/2", "2/2", "0/2")


def test_without_a_baseline_nothing_is_said_of_codecs(tmp_path: Path) -> None:
    missing = Result(
        run=Run(kind="instructions", codec=CodecSpec(name="raw"), settings={"told": True}),
        digest="",
        about={"model": "tiny"},
        status=Status.FAILED,
        problem="no memory left",
    )
    lines = "\n".join(KIND.section([missing], tmp_path))
    assert "Not measured without compression" in lines
    assert not list(tmp_path.iterdir())


def test_a_codec_that_merges_once_is_refused_before_anything_is_measured() -> None:
    offered = {"centroid": [CodecSpec(name="centroid")]}
    with pytest.raises(ConfigError, match="centroid"):
        KIND.runs(Table("here", {"codecs": "centroid"}, {}, offered))


def test_answers_of_another_length_are_another_table(tmp_path: Path) -> None:
    half = CodecSpec(name="streaming", ratio=2.0)
    short = [result(CodecSpec(name="raw"), [False, False]), result(half, [False, False], 0.5)]
    longer = [result(CodecSpec(name="raw"), [True, True]), result(half, [True, False], 0.5)]

    def of(results: Sequence[Result], tokens: int) -> list[Result]:
        settings = {"answer_tokens": tokens}
        return [
            replace(r, run=replace(r.run, settings={**r.run.settings, **settings})) for r in results
        ]

    lines = "\n".join(KIND.section([*of(short, 20), *of(longer, 40)], tmp_path))
    assert lines.count("Table 1.") == 2
    first, second = lines.split("Answers of 40 tokens at most:")
    assert "Answers of 20 tokens at most:" in first
    assert "| uncompressed | 100 % | 0 % " in first
    assert "| streaming 2x | 50 % | 0 % " in first
    assert "| uncompressed | 100 % | 100 % " in second
    assert "| streaming 2x | 50 % | 50 % " in second
