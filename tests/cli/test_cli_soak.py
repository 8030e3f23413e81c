"""The soak's own parts: that it would notice. The soak itself is a benchmark."""

from pathlib import Path

import pytest

from kvferry.cli.cluster_bench.soak import growth_pct, measure
from kvferry.cli.cluster_bench.soak_load import Ledger, check_blob, soak_blob
from kvferry.proto import container


def test_a_page_is_the_same_bytes_each_time_and_links_to_the_one_before() -> None:
    first, second = soak_blob(3, 0), soak_blob(3, 1)
    assert soak_blob(3, 1) == second
    header = container.read_header(second[1])
    assert header.previous_key == first[0].page_key
    assert soak_blob(4, 1)[0] != second[0]


def test_other_bytes_are_blamed() -> None:
    class Liar:
        def get(self, key: object) -> bytes:
            return soak_blob(1, 2)[1][:-1] + b"?"

    ledger = Ledger()
    check_blob(Liar(), ledger, 1, 2)  # type: ignore[arg-type]
    assert len(ledger.wrong) == 1


def test_growth_is_the_last_quarter_against_the_second() -> None:
    assert growth_pct([9, 9, 10, 10, 5, 5, 11, 11]) == 10.0
    assert growth_pct([1, 2]) == 0.0


@pytest.mark.processes
@pytest.mark.long
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    found = measure(0.15, nodes=2, kill_every_s=2.0, ops_per_s=20, plot=tmp_path / "memory.png")
    assert found["wrong_bytes"] == found["lost_blobs"] == 0, found
    assert found["drained"]
    assert int(str(found["accepted_blobs"])) > 10
    assert sum(found["kills"].values()) > 0  # type: ignore[attr-defined]
    assert (tmp_path / "memory.png").stat().st_size > 1000
