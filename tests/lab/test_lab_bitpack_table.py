"""The table of bitpack: figures that fit together, and targets judged by them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.codec.lab import bitpack_table
from kvferry.codec.lab.bitpack_targets import targets
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError


def test_more_bits_are_nearer_and_larger(tiny: LoadedModel, tokens: list[int]) -> None:
    ran: list[int] = []
    found = bitpack_table.measure(tiny, tokens[:341], 300, generated=12, done=ran.append)
    assert sum(ran) == bitpack_table.work(300, 40, 12)
    six, eight = found["rows"]
    assert (six["bits"], eight["bits"]) == (6, 8)
    for name in ("k_error_pct", "v_error_pct", "kl_mean"):
        assert 0 < eight[name] < six[name] / 2
    assert 1 < six["k_error_pct"] < 5  # 6 bits do not reach 1 %
    assert eight["k_error_pct"] < 1
    plain = found["memory"]["cache_plain"]
    assert plain == 4 * 312 * 3 * 2 * 2 * 16
    assert six["cache_bytes"] < eight["cache_bytes"] < plain / 2
    assert six["token_match"] <= 1
    assert (six["first_difference"] is None) == (six["token_match"] == 1)
    assert six["finite"]
    assert eight["finite"]
    assert six["share_pct"] > 0
    assert found["ppl_plain"] > 1
    names = [t["target"] for t in found["targets"] if t["bits"] == 6]
    assert len(names) == len(set(names)) == 7  # this model has no files to compare with


def test_targets_say_what_is_met_and_why_not() -> None:
    row: dict[str, Any] = {
        "bits": 6, "token_match": 0.97, "ppl_delta_pct": 0.1, "k_error_pct": 1.8,
        "v_error_pct": 0.9, "compress_ms_per_token": 0.2, "unpack_ms_per_token": 9.0,
        "overhead_pct": 4.0, "cache_bytes": 20,
    }  # fmt: skip
    memory = {"weights_in_files": 900, "cache_plain": 100}
    found = {t["target"].split(",")[0]: t for t in targets([row], memory)}
    met = {name for name, t in found.items() if t["met"]}
    assert met == {
        "perplexity increase", "relative error of V", "compression of a token",
        "latency overhead of a token",
    }  # fmt: skip
    assert "1/63 " in found["relative error of K"]["why"]
    saved = found["memory saved of quantized weights with a plain cache"]
    assert saved["measured"] == pytest.approx(8.0)
    assert "4.1 times the tokens" in saved["why"]  # 55 * x = 225


def test_what_cannot_be_measured_is_refused(tiny: LoadedModel, tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        bitpack_table.measure(tiny, tokens[:300], 300)


@pytest.mark.model
@pytest.mark.long
def test_the_command_prints_the_seeds_table(
    ok: Callable[..., dict[str, Any]], kvferry: Callable[..., Any], tmp_path: Path
) -> None:
    short = ("--prompt", "200", "--continuation", "40", "--generate", "20")
    found = ok("bench", "bitpack", *short)
    assert [row["bits"] for row in found["rows"]] == [6, 8]
    assert found["rows"][1]["k_error_pct"] < 1
    assert found["rows"][1]["top1_agreement"] > 0.9
    file = tmp_path / "bitpack.json"
    done = kvferry("bench", "bitpack", *short, "--json", file)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["model"] == "smollm2"
    assert "6 bits: cache" in done.stdout
    assert "NOT met" in done.stdout
