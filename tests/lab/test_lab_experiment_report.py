"""A report on results of which some were asked for otherwise, as after a file was edited."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.codec.lab.experiment.cost_report import cost_section
from kvferry.codec.lab.experiment.evidence import Evidence
from kvferry.codec.lab.experiment.fidelity_report import fidelity_section
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import newest
from kvferry.codec.lab.experiment.spec import CodecSpec, Run

TEXTS = ("prose", "source", "chat")


def fidelity(ratio: float, kl: float, text: str, calibration: str = "") -> Result:
    codec = CodecSpec(name="ferry", ratio=ratio, calibration=calibration)
    run = Run(kind="fidelity", codec=codec, text=text, context=1024, continuation=256)
    metrics = {"compression_ratio": ratio, "kl_mean": kl}
    return Result(run=run, digest="", about={"model": "tiny"}, metrics=metrics)


USUAL = [fidelity(r, kl, text) for r, kl in ((8.0, 0.005), (32.0, 0.02)) for text in TEXTS]
# One text measured again when the file wanted half of the continuation.
STALE = [
    replace(r, run=replace(r.run, continuation=128), metrics={**r.metrics, "kl_mean": 7.0})
    for r in USUAL
    if r.run.text == "source" and r.run.codec.ratio == 8.0
]


def test_targets_are_of_one_continuation() -> None:
    assert Evidence(USUAL).ratio_at_kl("ferry", 0.01) == pytest.approx(16.0)
    assert Evidence([*USUAL, *STALE]).ratio_at_kl("ferry", 0.01) == pytest.approx(16.0)


def test_targets_count_texts_rather_than_results() -> None:
    """Of a text that was also measured with another setting, not more is known."""
    twice = [
        replace(r, run=replace(r.run, settings={"greedy": 0}))
        for r in USUAL
        if r.run.text == "source" and r.run.codec.ratio == 8.0
    ]
    assert Evidence([*USUAL, *twice]).ratio_at_kl("ferry", 0.01) == pytest.approx(16.0)


def test_tables_are_of_one_continuation_and_say_what_is_left_out(tmp_path: Path) -> None:
    lines = fidelity_section([*USUAL, *STALE], tmp_path)
    assert "Not in here: 1 that predict more or fewer." in lines[0]
    assert "256 predicted" in lines[0]
    (row,) = [line for line in lines if line.startswith("| ferry 8x | 8.0x |")]
    assert "| 0.005 |" in row


@pytest.mark.parametrize("last_first", [True, False])
def test_calibrations_are_compared_at_one_length(tmp_path: Path, last_first: bool) -> None:
    own = [fidelity(8.0, 0.005, text, calibration="prose") for text in TEXTS]
    longer = [
        replace(r, run=replace(r.run, context=4096), metrics={**r.metrics, "kl_mean": 9.0})
        for r in own
    ]
    given = [*longer, *own] if last_first else [*own, *longer]
    lines = fidelity_section([*USUAL, *given], tmp_path)
    assert lines[-2] == "| ferry 8x | prose | 8.0x, 0.005 | 8.0x, 0.005 | 8.0x, 0.005 |"
    assert "1,024 tokens coded:" in lines
    # Those at another length are told where there are no others.
    alone = fidelity_section([*USUAL, *longer], tmp_path)
    assert "4,096 tokens coded:" in alone


def cost(processor: str, us: float, codec: str = "bitpack") -> Result:
    run = Run(kind="cost", codec=CodecSpec(name=codec), text="prose", context=1024)
    hardware = {"processor": processor, "cores": 2, "system": "any", "python": "any"}
    about = {"model": "tiny", "hardware": hardware, "load": 0.5}
    metrics = {"encode_us_per_token": us, "encode_share_of_generation": us / 1000}
    return Result(run=run, digest="", about=about, metrics=metrics)


def test_times_of_two_machines_are_two_tables_and_no_target_mixes_them() -> None:
    results = newest(
        [
            cost("M9", 7.0),
            cost("EPYC", 40.0),
            cost("EPYC", 20.0),  # again
            cost("EPYC", 30.0, "affine"),
        ]
    )
    lines = cost_section(results)
    first, second = lines.index("On EPYC, 2 cores:"), lines.index("On M9, 2 cores:")
    assert first < second
    rows = [line.split(" | ")[3] for line in lines if line.startswith(("| affine", "| bitpack"))]
    assert rows == ["30", "20", "7"]
    found = Evidence(results).mean("cost", "bitpack", "encode_share_of_generation")
    assert found == pytest.approx(0.02)


def test_each_text_is_told_by_itself(tmp_path: Path) -> None:
    """A codec may do well on texts that its calibration was chosen on, and less so on others."""
    chat = [fidelity(r, 4 * kl, "chat") for r, kl in ((2.0, 0.00125), (8.0, 0.005), (32.0, 0.02))]
    own = [r for r in USUAL if r.run.text != "chat"]
    lines = fidelity_section([*own, *chat], tmp_path)
    assert "| codec | chat | prose | source |" in lines
    assert "| ferry | 4.0x | 16.0x | 16.0x |" in lines
