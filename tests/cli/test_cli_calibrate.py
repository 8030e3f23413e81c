"""``kvferry calibrate`` from its parts: what is the same whichever codec is asked for."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.cli.calibrate_kvtc import KvtcPart
from kvferry.cli.calibrate_lowrank import LowRankPart
from kvferry.cli.calibrate_run import Asked, Part, run
from kvferry.errors import ModelError

TOKENS = 600
FOR_ALL = {
    "model", "model_id", "codec", "calibration_id", "folder", "made", "tokens", "text_source",
    "bytes", "memory", "seconds",
}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """On a small model, into a folder of its own."""
    (tmp_path / "model").mkdir()
    save_model(*sharp_llama(97, head_dim=32), tmp_path / "model")
    draw = random.Random(3)
    (tmp_path / "own.txt").write_text("".join(chr(draw.randrange(97, 123)) for _ in range(9000)))
    return Asked(
        model=str(tmp_path / "model"),
        text=[tmp_path / "own.txt"],
        out=tmp_path / "made",
        json=str(tmp_path / "told.json"),
        if_missing=True,
        restart=False,
        limit=None,
    )


def told(part: Part[Any], asked: Asked) -> dict[str, Any]:
    run(part, asked)
    assert asked.json is not None
    return dict(json.loads(Path(asked.json).read_text()))


@pytest.mark.parametrize(("part", "own"), [(LowRankPart, {"lost_variance"}), (KvtcPart, {"rank"})])
def test_one_is_made_once_and_told(
    asked: Asked, part: type[LowRankPart | KvtcPart], own: set[str], capsys: Any
) -> None:
    made = told(part(TOKENS), asked)
    assert set(made) >= FOR_ALL | own
    assert (made["codec"], made["made"], made["tokens"]) == (part.codec, True, TOKENS)
    assert made["text_source"] == "own.txt"
    assert part(TOKENS).load(Path(made["folder"])).id.hex() == made["calibration_id"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{asked.out}: ")
    again = told(part(TOKENS), asked)
    assert again == {"model": asked.model, "folder": str(asked.out), "made": False}
    assert f"for {part.codec} is there already" in capsys.readouterr().err


def test_one_of_another_codec_is_not_taken_for_it_and_leaves_nothing_behind(asked: Asked) -> None:
    assert asked.out is not None
    told(KvtcPart(TOKENS), asked)
    before = {path.stem for path in asked.out.glob("*.kvferry")}
    made = told(LowRankPart(TOKENS), asked)
    assert made["made"]
    after = {path.stem for path in asked.out.glob("*.kvferry")}
    assert after == {made["group_id"]}
    assert not after & before


def test_memory_is_refused_before_the_run(asked: Asked) -> None:
    assert asked.out is not None
    with pytest.raises(ModelError, match="--memory-limit"):
        run(LowRankPart(TOKENS), replace(asked, limit=1))
    assert not asked.out.exists()
