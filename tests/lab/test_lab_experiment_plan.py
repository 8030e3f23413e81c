"""A TOML file becomes runs, or one line that says what is wrong with it."""

import tomllib
from pathlib import Path

import pytest

from kvferry.codec.lab.experiment.plan import Plan, load_plan
from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError

HEAD = """
texts = ["prose", "source"]
contexts = [64, 128]
continuation = 16
[[codec]]
name = "affine"
options = { bits = 4 }
[[codec]]
name = "streaming"
label = "streaming (original)"
options = { positions = "original" }
ratios = [2, 4]
"""
CALIBRATION = '[[calibration]]\nname = "{}"\ncodecs = "ferry"\ntexts = "{}"\n'
FIDELITY = '[[experiment]]\nkind = "fidelity"\ngreedy = 0\n'


def plan(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return load_plan(path)


def test_every_text_length_and_codec_is_a_run_and_texts_stay_together(tmp_path: Path) -> None:
    found = plan(tmp_path, HEAD + FIDELITY)
    assert len(found.runs) == 2 * 2 * 3
    assert found.texts == ("prose", "source")
    spans = [(run.text, run.context) for run in found.runs]
    assert spans == sorted(spans, key=spans.index)
    assert {run.continuation for run in found.runs} == {16}
    ratios = [r.codec.ratio for r in found.runs if r.codec.name == "streaming"]
    assert sorted(set(ratios), key=str) == [2.0, 4.0]


def test_ratios_of_an_experiment_leave_options_aside(tmp_path: Path) -> None:
    asked = (
        FIDELITY + 'codecs = ["affine", "kvtc"]\nratios = [2, 8]\ncontexts = 64\ntexts = "prose"\n'
    )
    found = plan(tmp_path, HEAD + asked)
    told = [(run.codec.name, run.codec.ratio, dict(run.codec.options)) for run in found.runs]
    assert told == [("affine", 2.0, {}), ("affine", 8.0, {}), ("kvtc", 2.0, {}), ("kvtc", 8.0, {})]


def test_ratios_of_an_experiment_leave_other_options_as_they_are(tmp_path: Path) -> None:
    """Only what is turned is taken out, under any of its names."""
    asked = """
[[codec]]
name = "streaming"
options = { sinks = 64, window = 100 }
[[codec]]
name = "ferry"
options = { target_kl = 0.01, adapt = 1 }
[[codec]]
name = "ferry"
options = { step = 0.1, adapt = 1 }
[[codec]]
name = "lowrank"
options = { policy = "high_compression", identity = "0-4" }
[[codec]]
name = "kvtc"
options = { entropy = "zstd" }
[[experiment]]
kind = "fidelity"
codecs = ["streaming", "ferry", "lowrank", "kvtc"]
ratios = 2
contexts = 64
texts = "prose"
"""
    found = plan(tmp_path, HEAD + asked)
    told = [(run.codec.name, dict(run.codec.options)) for run in found.runs]
    assert told == [
        ("streaming", {"sinks": 64}),
        ("ferry", {"adapt": 1}),
        ("lowrank", {"identity": "0-4"}),
        ("kvtc", {"entropy": "zstd"}),
    ]


def test_what_two_experiments_ask_for_is_run_once(tmp_path: Path) -> None:
    assert len(plan(tmp_path, HEAD + FIDELITY + FIDELITY).runs) == 12


def test_a_digest_changes_with_all_that_figures_depend_on(tmp_path: Path) -> None:
    first, second = plan(tmp_path, HEAD + FIDELITY).runs[:2]
    other = plan(tmp_path, HEAD + FIDELITY.replace("greedy = 0", "greedy = 1")).runs[0]
    digests = [
        first.digest({}),
        second.digest({}),
        other.digest({}),
        first.digest({"model_id": "x"}),
    ]
    assert len(set(digests)) == 4
    assert first.digest({"a": 1, "b": 2}) == first.digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("texts = [", "TOML"),
        ("", "experiment"),
        (HEAD + '[[experiment]]\nkind = "nonsense"\n', "one of fidelity"),
        (HEAD + FIDELITY + 'codecs = ["nonsense"]\n', "streaming (original)"),
        (HEAD + FIDELITY + "contexts = [0]\n", "contexts"),
        (HEAD + FIDELITY + "contexts = [true]\n", "contexts"),
        (HEAD + FIDELITY + "continuation = 1.5\n", "continuation"),
        (HEAD + FIDELITY + "ratios = [0.5]\n", "ratios"),
        (HEAD + FIDELITY + "raitos = [2]\n", "raitos"),
        ("colour = 3\n" + HEAD + FIDELITY, "colour"),
        (HEAD + FIDELITY + 'texts = ["no/such/file"]\n', "no/such/file"),
        ('[[codec]]\nname = "nonsense"\n' + FIDELITY, "one of raw"),
        ('[[codec]]\nname = "raw"\noptions = { a = [1] }\n' + FIDELITY, "options.a"),
        ('[[codec]]\nname = "affine"\noptions = { bitz = 4 }\n' + FIDELITY, "affine option bitz"),
        ('[[codec]]\nname = "lowrank"\noptions = { rank = 0 }\n' + FIDELITY, "codec 1: rank"),
        ("codec = 3\n" + FIDELITY, "[[codec]]"),
        (HEAD + FIDELITY + CALIBRATION.format("../up", "prose"), "name"),
        (HEAD + FIDELITY + CALIBRATION.format("some", "chat"), "chat"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_them(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(tmp_path, text)
    line = str(raised.value)
    assert says in line
    assert "\n" not in line


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml"):
        load_plan(tmp_path / "no.toml")


def test_the_files_of_the_benchmarks_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "experiments"
    files = sorted(folder.glob("*.toml"))
    assert {"tiny.toml", "codecs.toml", "lengths.toml"} <= {file.name for file in files}
    for file in files:
        named = {codec["name"] for codec in tomllib.loads(file.read_text()).get("codec", [])}
        if named <= set(codec_names()):
            assert load_plan(file).runs
