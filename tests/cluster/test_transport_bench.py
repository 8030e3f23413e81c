"""``kvferry bench transport`` prints what others lean on. Nothing here asserts time."""

import json
import subprocess
import sys

import pytest

from kvferry.cluster.bench_peer import bench_blob
from kvferry.proto import container

FIELDS = {"put_ratio", "get_ratio", "put_verified_ratio", "get_verified_ratio"}


@pytest.mark.parametrize("size", [1024, 100_000, 1 << 20, (16 << 20)])
def test_the_measured_blob_is_a_real_one_of_that_size(size: int) -> None:
    blob = bench_blob(size)
    assert len(blob) == size
    container.parse(blob)


@pytest.mark.processes
def test_bench_transport_prints_one_json_object() -> None:
    command = [sys.executable, "-m", "kvferry", "bench", "transport"]
    command += ["--size-mib", "1", "--rounds", "3", "--tls", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout)
    assert result.keys() >= FIELDS
    assert result["blob_bytes"] == 1 << 20
    for name in ("raw_put", "raw_get", "put", "get", "put_verified", "get_verified"):
        assert result[f"{name}_bytes_per_s"] > 0
        assert result[f"{name}_tls_bytes_per_s"] > 0
    assert 0 < result["put_tls_ratio"] < 100
    assert 0 < result["get_tls_vs_raw_tls_ratio"] < 100
    assert all(0 < result[field] < 100 for field in FIELDS)
