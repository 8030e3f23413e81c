"""`kvferry verify` over folders and over a real store."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.cluster.blob_name import blob_name
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.proto import container
from kvferry.proto.keys import BlobKey

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ("raw", "zstd", "affine8", "ferry", "calibration_ferry")


def _kvferry(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "kvferry", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def _key(data: bytes) -> BlobKey:
    return container.key_of(container.read_header(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five whole blobs in a tree, with files beside them that are none."""
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(GOLDEN / f"{name}.kvferry", tree / "deep" / f"{name}.kvferry")
    (tree / "notes.txt").write_text("no blob")
    shutil.copy(GOLDEN / "raw.kvferry", tree / "deep" / "er" / "by_magic")
    return tree


def test_a_whole_folder_is_counted_by_kind(folder: Path) -> None:
    value = json.loads(_kvferry("verify", str(folder), "--json", "-").stdout)
    assert value["ok"]
    assert value["checked"] == 6
    assert value["skipped"] == 1
    assert value["kinds"]["page"]["blobs"] == 5
    assert value["kinds"]["calibration"]["blobs"] == 1
    assert value["bytes"] == sum(kind["bytes"] for kind in value["kinds"].values())
    shown = _kvferry("verify", str(folder))
    assert "all 6 whole" in shown.stdout
    assert "verifying: 100%" in shown.stderr


def test_damaged_files_are_named_with_their_fields(folder: Path) -> None:
    bad = folder / "deep" / "ferry.kvferry"
    data = bytearray(bad.read_bytes())
    data[-60] ^= 1
    bad.write_bytes(data)
    (folder / "deep" / "empty.kvferry").write_bytes(b"")
    value = json.loads(_kvferry("verify", str(folder), "--json", "-", status=1).stdout)
    found = {row["blob"]: [f["field"] for f in row["findings"]] for row in value["bad"]}
    assert set(found) == {"deep/ferry.kvferry", "deep/empty.kvferry"}
    assert found["deep/ferry.kvferry"][-1] == "digest"
    assert found["deep/empty.kvferry"] == ["prefix"]
    shown = _kvferry("verify", str(folder), status=1).stdout
    assert "2 of 7 damaged" in shown
    assert "deep/ferry.kvferry" in shown


def test_a_blob_under_another_ones_name_is_found(tmp_path: Path) -> None:
    root = tmp_path / "blobs" / "00"
    root.mkdir(parents=True)
    raw, zstd = ((GOLDEN / f"{n}.kvferry").read_bytes() for n in ("raw", "zstd"))
    (root / blob_name(_key(raw))).write_bytes(raw)
    (root / blob_name(_key(zstd), 2_000_000_000)).write_bytes(raw)
    value = json.loads(_kvferry("verify", str(tmp_path), "--json", "-", status=1).stdout)
    assert [row["findings"][0]["field"] for row in value["bad"]] == ["key"]


def test_what_a_store_set_aside_or_is_writing_is_left_out(tmp_path: Path) -> None:
    for part in ("blobs", "quarantine", "tmp"):
        (tmp_path / part).mkdir()
        shutil.copy(GOLDEN / "raw.kvferry", tmp_path / part / "x.kvferry")
    (tmp_path / "quarantine" / "x.kvferry").write_bytes(b"bad")
    value = json.loads(_kvferry("verify", str(tmp_path), "--json", "-").stdout)
    assert (value["checked"], value["set_aside"]) == (1, 1)


def test_links_are_not_followed(tmp_path: Path, folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "linked.kvferry").symlink_to(tmp_path / "nowhere")
    assert json.loads(_kvferry("verify", str(folder), "--json", "-").stdout)["checked"] == 6


def test_one_file_may_be_named(folder: Path) -> None:
    path = str(folder / "deep" / "raw.kvferry")
    assert json.loads(_kvferry("verify", path, "--json", "-").stdout)["checked"] == 1


def test_bad_targets_are_one_line(tmp_path: Path) -> None:
    for target, status, part in (
        (str(tmp_path / "none"), 2, "folder or file that exists"),
        ("127.0.0.1:1", 1, "cannot be reached"),
    ):
        lines = _kvferry("verify", target, status=status).stderr.strip().splitlines()
        assert len(lines) == 1
        assert part in lines[0]
    repaired = _kvferry("verify", str(tmp_path), "--repair", status=2)
    assert "for a running store" in repaired.stderr


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running store with all golden blobs: its address and its root."""
    root, ready = tmp_path / "root", tmp_path / "ready.json"
    command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "", "--backend", f"file://{root}", "--ready-file", str(ready)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while not ready.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        address = json.loads(ready.read_text())["address"]
        with SyncBlobStoreClient(address) as client:
            for name in NAMES:
                data = (GOLDEN / f"{name}.kvferry").read_bytes()
                assert client.put(_key(data), data)
        yield address, root
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.processes
def test_a_store_verifies_and_sets_aside_its_own(store: tuple[str, Path]) -> None:
    address, root = store
    value = json.loads(_kvferry("verify", address, "--json", "-").stdout)
    assert (value["ok"], value["checked"]) == (True, 5)
    (path,) = root.glob("blobs/*/page-*-zstd*")
    with path.open("r+b") as file:
        file.seek(-50, 2)
        file.write(b"damage")
    value = json.loads(_kvferry("verify", address, "--json", "-", status=1).stdout)
    assert [row["blob"] for row in value["bad"]] == [
        str(_key((GOLDEN / "zstd.kvferry").read_bytes()))
    ]
    shown = _kvferry("verify", address, "--repair", status=1).stdout
    assert "1 of 5 damaged, now set aside" in shown
    value = json.loads(_kvferry("verify", address, "--json", "-").stdout)
    assert (value["checked"], value["set_aside"]) == (4, 1)


@pytest.mark.processes
def test_blobs_are_inspected_by_key_where_they_are(store: tuple[str, Path]) -> None:
    address, _ = store
    key = _key((GOLDEN / "ferry.kvferry").read_bytes())
    value = json.loads(_kvferry("inspect", str(key), "--store", address, "--json", "-").stdout)
    assert value["ok"]
    assert value["key"] == str(key)
    assert value["calibration"]["found"] == address
    page = _kvferry("inspect", key.page_key.hex(), "--store", address, "--json", "-")
    assert str(key) in json.loads(page.stdout)["keys"]
    calibration = _key((GOLDEN / "calibration_ferry.kvferry").read_bytes())
    single = _kvferry("inspect", calibration.page_key.hex(), "--store", address, "--json", "-")
    assert json.loads(single.stdout)["kind"] == "calibration"
    missing = str(key).replace("L2-4", "L2-3")
    done = _kvferry("inspect", missing, "--store", address, status=1)
    assert "no blob" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    none = _kvferry("inspect", "ab" * 32, "--store", address, status=1)
    assert "no blob" in none.stderr
