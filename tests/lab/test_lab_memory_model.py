"""What the benches of memory rest on: the small model can do what is asked of it."""

from types import SimpleNamespace

import pytest

from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.instructions import Instructions
from kvferry.codec.lab.experiment.needles import Needles
from kvferry.codec.lab.experiment.spec import CodecSpec
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.experiment.texts import content_of
from kvferry.codec.lab.text import first_tokens
from kvferry.codec.mlx.load import load_model
from kvferry.codec.mlx.probe import describe

pytestmark = [pytest.mark.model, pytest.mark.long]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    loaded = load_model("smollm2")
    text = content_of("prose", tmp_path_factory.mktemp("none"))
    nothing = SimpleNamespace(groups=(), curve=(), id=b"")
    return Bench(
        loaded,
        bytes(32),
        describe(loaded.model, loaded.config),
        {"prose": lambda count: first_tokens(loaded.tokenizer, text, count, "prose")},
        lambda _: nothing,
    )


def table(codec: CodecSpec, **values: object) -> Table:
    return Table("here", values, {}, {codec.name: [codec]})


def test_a_passkey_is_found_and_forgotten_with_its_tokens(bench: Bench) -> None:
    forgetful = CodecSpec(name="streaming", ratio=8.0)
    runs = Needles().runs(table(forgetful, lengths=[512], depths=[0.25, 0.75], several=0))
    exact, dropped = (Needles().measure(run, bench, lambda _: None)["needles"] for run in runs)
    assert [needle["exact"] for needle in exact] == [True, True]
    assert [needle["exact"] for needle in dropped] == [False, False]
    assert [needle["alone"] for needle in dropped] == [0.0, 0.0]
    for own, lost in zip(exact, dropped, strict=True):
        assert own["log_prob"] > lost["log_prob"] + 5


def test_an_instruction_is_remembered_and_forgotten_with_its_tokens(bench: Bench) -> None:
    forgetful = CodecSpec(name="streaming", ratio=8.0)
    runs = Instructions().runs(table(forgetful, kinds=["reminder"], examples=3))
    right = [
        sum(one["right"] for one in Instructions().measure(run, bench, lambda _: None)["examples"])
        for run in runs
    ]
    assert right == [3, 0, 0]
