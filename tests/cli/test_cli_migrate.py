"""`kvferry migrate` as a command: what it says, and Ctrl-C in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvferry.cluster.blob_name import blob_name
from kvferry.proto import container
from kvferry.proto.v1 import blob_pb2

pytestmark = pytest.mark.processes

COUNT = 60
SIZE = 1 << 20
MODELS = (b"\xaa" * 32, b"\xbb" * 32)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvferry", "migrate", *arguments]


def migrate(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def told(*arguments: str, status: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads(migrate(*arguments, "--json", "-", status=status).stdout)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's folder with many blobs of two models, without an index."""
    root = tmp_path_factory.mktemp("source") / "root"
    (root / "blobs").mkdir(parents=True)
    for i in range(COUNT):
        data = os.urandom(SIZE)
        header = blob_pb2.BlobHeader(
            kind=blob_pb2.BLOB_KIND_PAGE,
            model_id=MODELS[i % 2],
            page_key=bytes([i]) * 32,
            previous_key=b"\x01" * 32,
            token_end=256,
            layer_end=2,
            head_end=1,
            model_layers=2,
            model_heads=1,
            codec=blob_pb2.CodecSpec(name="raw", version=1, params_json="{}"),
        )
        raw = container.pack(header, [container.SectionData("k", data, len(data))])
        folder = root / "blobs" / f"{i:02x}"
        folder.mkdir(exist_ok=True)
        (folder / blob_name(container.key_of(container.read_header(raw)))).write_bytes(raw)
    return root


def blobs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "blobs").glob("*/*")}


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"file://{tmp_path}/target"


def test_it_says_what_is_missing_and_then_copies_it(source: Path, target: str) -> None:
    dry = told(f"file://{source}", target, "--dry-run")
    assert (dry["missing"], dry["present"], dry["dry_run"]) == (COUNT, 0, True)
    one = told(f"file://{source}", target, "--model", "aaaa")
    assert (one["copied"], one["present"]) == (COUNT // 2, 0)
    shown = migrate(f"file://{source}", target, "--dry-run").stdout
    assert f"{COUNT // 2} blobs to copy" in shown
    assert f"{COUNT // 2} pages), {COUNT // 2} there already" in shown
    done = migrate(f"file://{source}", target)
    assert f"{COUNT // 2} blobs copied" in done.stdout
    assert f"{COUNT // 2} there already" in done.stdout
    assert "copying: 100%" in done.stderr
    assert blobs(Path(target.removeprefix("file://"))) == blobs(source)


def test_ctrl_c_and_the_same_again(source: Path, target: str) -> None:
    root = Path(target.removeprefix("file://"))
    process = subprocess.Popen(
        command(f"file://{source}", target, "--parallel", "1", "--json", "-"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(list(root.glob("blobs/*/*"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
    first = json.loads(out)
    assert first["stopped"]
    assert 5 <= first["copied"] < COUNT
    assert len(blobs(root)) == first["copied"]
    rest = told(f"file://{source}", target)
    assert (rest["copied"], rest["present"]) == (COUNT - first["copied"], first["copied"])
    assert blobs(root) == blobs(source)


def test_killed_and_the_same_again(source: Path, target: str) -> None:
    root = Path(target.removeprefix("file://"))
    process = subprocess.Popen(
        command(f"file://{source}", target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list(root.glob("blobs/*/*"))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait(20)
    here = len(blobs(root))
    rest = told(f"file://{source}", target)
    assert rest["copied"] == COUNT - here
    assert blobs(root) == blobs(source)


def test_bad_usage_is_one_line(source: Path, target: str, tmp_path: Path) -> None:
    for given, status, says in (
        ([f"file://{tmp_path}/none", target], 2, "a folder that exists"),
        ([f"file://{source}", f"file://{source}"], 2, "another place"),
        (["http://x", target], 2, "file:///PATH"),
        ([f"file://{source}", "127.0.0.1:1"], 1, "cannot be reached"),
        ([f"file://{source}", "redis://:secret@127.0.0.1:1"], 1, "redis://127.0.0.1:1"),
        ([f"file://{source}", target, "--model", "nothex"], 2, "hex digits"),
        ([f"file://{source}", target, "--budget-bytes", "1000000"], 1, "full"),
    ):
        lines = migrate(*given, status=status).stderr.strip().splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
        assert "secret" not in lines[0]
