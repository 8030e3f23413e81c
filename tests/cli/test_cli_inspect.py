"""What `kvferry inspect` says of blobs that are whole, damaged, foreign and hostile."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from kvferry.cli import inspect as command
from kvferry.cli.blob_report import report_on
from kvferry.cli.blob_screen import as_json, print_report
from kvferry.cli.blob_source import report_file
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, encode_blob
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError
from kvferry.places import user_dir
from kvferry.proto import container
from kvferry.proto.container import Limits
from kvferry.proto.v1 import blob_pb2

GOLDEN = Path(__file__).parent.parent / "golden"
FERRY = (GOLDEN / "ferry.kvferry").read_bytes()
CALIBRATION = (GOLDEN / "calibration_ferry.kvferry").read_bytes()


def _page(codec: str, kind: str = "page", **options: object) -> tuple[Any, bytes]:
    """Four layers, two heads, 256 tokens of 16: 128 KiB in fp16."""
    shape = (4, 2, 256, 16)
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
    streams = {name: Stream(name, values, DType.FLOAT16) for name in ("k", "v")}
    page = PageTensors((8, 12), (0, 2), (256, 512), streams)
    digest = bytes(range(32))
    meta = BlobMeta(
        kind=kind, model_id=digest, page_key=digest, previous_key=digest,
        model_layers=30, model_heads=2,
    )  # fmt: skip
    return encode_blob(make_codec(codec, options), page, meta)


def _changed(change: Callable[[Any], object], data: bytes = FERRY) -> bytes:
    """The blob with another header, every checksum made to fit."""
    blob = container.parse(data)
    change(blob.header)
    return container.pack(blob.header, list(blob.sections.values()))


def _screen(data: bytes, width: int = 80, found: str | None = "") -> str:
    out = io.StringIO()
    print_report(report_on(data, "somewhere"), found, Console(file=out, width=width))
    return out.getvalue()


def _run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("kind", ["page", "tail"])
def test_sizes_ratio_and_identity_of_a_raw_blob(kind: str) -> None:
    key, data = _page("raw", kind)
    report = report_on(data, "x", key)
    assert report.ok
    assert (report.kind, report.key) == (kind, key)
    assert report.fp16_bytes == 2 * 4 * 2 * 256 * 16 * 2
    assert report.ratio == pytest.approx(report.fp16_bytes / len(data))
    assert report.bits_per_value == pytest.approx(8 * len(data) / (report.fp16_bytes / 2))
    assert [(s.name, s.size, s.shape) for s in report.streams] == [
        ("k", 65_536, (4, 2, 256, 16)),
        ("v", 65_536, (4, 2, 256, 16)),
    ]
    # Stored as it is, layer after layer: bytes of a layer are known.
    assert [(x.layer, x.size, x.exact) for x in report.layers] == [
        (layer, 32_768.0, True) for layer in range(8, 12)
    ]


def test_a_blob_that_lacks_tokens_says_which_it_kept() -> None:
    data = _page("random", ratio=64, seed=3)[1]
    report = report_on(data, "x")
    assert report.ok
    assert report.kept is not None
    assert (report.kept.tokens, report.kept.entries) == (256, 4)
    assert sum(b - a for a, b in report.kept.spans) == 4
    assert all(256 <= a < b <= 512 for a, b in report.kept.spans)
    # What was dropped counts: the ratio is to all the tokens that it stands for.
    assert report.fp16_bytes == 2 * 4 * 2 * 256 * 16 * 2
    value = as_json(report, None)
    assert value["kept"] == {
        "tokens": 256,
        "entries": 4,
        "spans": [list(span) for span in report.kept.spans],
    }
    shown = _screen(_page("streaming", window=20, positions="original")[1], 100, None)
    assert "20 of 256 tokens, 236 dropped: 492-511" in shown
    assert "positions=original sinks=4 window=20" in shown
    assert report_on(_page("raw")[1], "x").kept is None


def test_a_blob_of_merged_tokens_says_how_many_entries_they_became() -> None:
    data = (Path(__file__).parents[1] / "golden" / "centroid.kvferry").read_bytes()
    report = report_on(data, "x")
    assert report.ok
    assert report.kept is not None
    assert not report.kept.spans
    shown = _screen(data, 100, None)
    assert f"12 tokens in at most {report.kept.entries} entries, of each head its own" in shown
    assert "similarity=0.2" in shown


def test_layers_that_are_coded_together_get_a_fair_share() -> None:
    report = report_on(FERRY, "x")
    assert not any(layer.exact for layer in report.layers)
    total = sum(layer.size for layer in report.layers)
    assert total == pytest.approx(sum(stream.size for stream in report.streams))


def test_a_section_that_names_its_layer_is_counted_there() -> None:
    blob = container.parse(_page("raw")[1])
    halves = []
    for name, section in blob.sections.items():
        data = bytes(section.data)
        stream = name.partition("/")[0]
        halves.append(container.SectionData(f"{stream}/L8/q", data[:100], 200))
        halves.append(container.SectionData(f"{stream}/rest", data[100:], len(data)))
    report = report_on(container.pack(blob.header, halves), "x")
    sizes = [layer.size for layer in report.layers]
    assert sizes[0] == pytest.approx(sizes[1] + 200)
    assert report.streams[0].size == 65_536


def test_json_has_every_part_and_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(FERRY)
    status, out = _run(str(path), "--json", "-")
    value = json.loads(out)
    assert status == 0
    assert value["ok"]
    assert value["kind"] == "page"
    assert value["key"].startswith("page/")
    assert value["codec"]["name"] == "ferry"
    assert value["codec"]["params"]["step"] == 0.25
    assert value["layers"] == [2, 4]
    assert {s["name"] for s in value["streams"]} == {"k", "v"}
    assert {s["name"] for s in value["sections"]} >= {"k+v/q", "k/sinks"}
    assert value["compression_ratio"] == pytest.approx(value["fp16_bytes"] / value["bytes"], 1e-3)
    assert value["calibration"]["found"] == ""
    assert all(check["ok"] for check in value["checks"])


def test_a_calibration_in_the_users_cache_is_found(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(FERRY)
    header = container.read_header(CALIBRATION)
    folder = user_dir("cache") / "calibrations" / "by-id"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{header.page_key.hex()}.kvferry"
    kept.write_bytes(CALIBRATION)
    try:
        _, out = _run(str(path), "--json", "-")
        assert json.loads(out)["calibration"]["found"] == str(kept)
        _, shown = _run(str(path))
        assert "found:" in shown
    finally:
        kept.unlink()
    _, shown = _run(str(path))
    assert "not found here" in shown


def test_a_calibration_is_opened_and_its_id_checked() -> None:
    report = report_on(CALIBRATION, "x")
    assert report.ok
    assert report.kind == "calibration"
    assert report.content["type"] == "group"
    shown = _screen(CALIBRATION)
    assert "rank 60 of 64, weighted" in shown
    assert "learned from" in shown

    def other_id(header: Any) -> None:
        header.page_key = bytes(32)

    wrong = report_on(_changed(other_id, CALIBRATION), "x")
    assert [c.field for c in wrong.checks if not c.ok] == ["calibration"]


def test_the_screen_fits_a_terminal_and_says_what_matters() -> None:
    for width in (80, 120):
        shown = _screen(FERRY, width)
        rows = shown.splitlines()
        assert max(len(row) for row in rows[2:]) <= width  # the key's row is not folded
        for part in ("whole", "layers 2 to 3 of 4", "KV head 0 of 1", "step=0.25", "MiB"):
            assert part in shown


def test_damage_is_told_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    flipped = bytearray(FERRY)
    flipped[-100] ^= 1
    path.write_bytes(flipped)
    status, shown = _run(str(path))
    assert status == 1
    assert "damaged" in shown
    assert "checksum differs" in shown
    assert "digest" in shown
    assert "in order" in shown
    status, out = _run(str(path), "--json", "-")
    bad = [c["field"] for c in json.loads(out)["checks"] if not c["ok"]]
    assert status == 1
    assert bad[-1] == "digest"
    assert bad[0].startswith("section ")


@pytest.mark.parametrize("size", [0, 1, 11, 12, 60, 500, len(FERRY) - 1])
def test_a_cut_blob_is_damaged_wherever_it_is_cut(size: int) -> None:
    report = report_on(FERRY[:size], "x")
    assert not report.ok
    assert "damaged" in _screen(FERRY[:size])


def test_foreign_and_newer_files_are_named() -> None:
    assert "no kvferry blob" in _screen(b"PK\x03\x04" * 100)
    newer = bytearray(FERRY)
    newer[7] = 9
    assert "version 9" in _screen(bytes(newer))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h: h.streams[0].shape.append(7), "stream k"),
        (lambda h: h.streams[0].shape.__setitem__(0, 9), "stream k"),
        (lambda h: h.streams[1].shape.__setitem__(2, 1 << 31), "stream v"),
        (lambda h: setattr(h.streams[0], "dtype", "float8"), "stream k"),
        (lambda h: h.ClearField("streams"), "streams"),
        (lambda h: setattr(h, "layer_end", 1), "ranges"),
        (lambda h: setattr(h, "kind", 77), "ranges"),
        (lambda h: setattr(h.codec, "params_json", "[1]"), "ranges"),
        (lambda h: setattr(h.codec, "params_json", "[" * 50_000), "ranges"),
        (lambda h: setattr(h, "model_id", b"short"), "ranges"),
    ],
)
def test_headers_that_cannot_be_are_told_by_field(
    change: Callable[[Any], object], field: str
) -> None:
    data = _changed(change)
    report = report_on(data, "x")
    assert field in [check.field for check in report.checks if not check.ok]
    _screen(data)
    json.dumps(as_json(report, None), allow_nan=False)


def test_text_of_a_blob_is_shown_not_obeyed() -> None:
    def hostile(header: Any) -> None:
        header.producer = "\x1b[2J\x1b]0;owned\x07[bold red]hi[/]" + "x" * 5000
        header.streams[0].name = "k\x1b[31m\n"
        header.codec.params_json = json.dumps({"a\x1b": "\x1b[0m"})

    shown = _screen(_changed(hostile))
    assert "\x1b" not in shown
    assert "red]hi[/]" in shown
    assert len(shown) < 5000


def test_another_key_than_the_one_asked_for_is_damage(tmp_path: Path) -> None:
    key, data = _page("zstd")
    other, _ = _page("raw")
    assert report_on(data, "x", key).ok
    wrong = report_on(data, "x", other)
    assert [c.field for c in wrong.checks if not c.ok] == ["key"]
    misplaced = tmp_path / str(other).replace("/", "-")  # a store's file name says the key
    misplaced.write_bytes(data)
    assert not report_file(misplaced).ok


def test_a_file_beyond_the_cap_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte
    report = report_file(path)
    assert [c.field for c in report.checks] == ["size"]
    assert not report.ok
    assert report.size == 1 << 40


def test_what_is_neither_file_nor_key_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a file"):
        _run("page/nothing")
    with pytest.raises(ConfigError, match="takes folders"):
        _run(str(tmp_path))
    with pytest.raises(ConfigError, match="one of the two"):
        _run("x", "--store", "127.0.0.1:1", "--node", "/tmp/n.sock")
    with pytest.raises(ConfigError, match="a node that runs"):
        _run("x", "--node", str(tmp_path / "n.sock"))
    with pytest.raises(ConfigError, match="HOST:PORT"):
        _run("x", "--store", "nowhere")


@given(st.integers(0, len(FERRY) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found_and_told(at: int, flip: int) -> None:
    data = bytearray(FERRY)
    data[at] ^= flip
    report = report_on(bytes(data), "x")
    assert not report.ok
    json.dumps(as_json(report, None), allow_nan=False)
    print_report(report, None, Console(file=io.StringIO(), width=80))


@given(st.binary(max_size=400))
def test_any_header_bytes_end_in_a_report(junk: bytes) -> None:
    body = container.MAGIC + len(junk).to_bytes(4, "little") + junk
    data = body + container.blake3(body).digest()
    report = report_on(data, "x", limits=Limits(max_raw=1 << 20))
    assert not report.ok
    print_report(report, None, Console(file=io.StringIO(), width=80))


def test_the_process_fails_in_plain_words_and_without_mlx(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(FERRY[:700])
    for argument, status, stream in (("cut", 1, "stdout"), ("missing", 2, "stderr")):
        done = subprocess.run(
            [sys.executable, "-m", "kvferry", "inspect", str(tmp_path / argument)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status
        assert "Traceback" not in done.stdout + done.stderr
        assert getattr(done, stream).strip()
    check = (
        "import sys; from kvferry.cli import blob_report, blob_screen, blob_source, verify_run\n"
        "data = open(sys.argv[1], 'rb').read(); assert blob_report.report_on(data, 'x').ok\n"
        "assert not any(m.partition('.')[0] in ('mlx', 'mlx_lm') for m in sys.modules)"
    )
    golden = str(GOLDEN / "calibration_ferry.kvferry")
    subprocess.run([sys.executable, "-c", check, golden], check=True, timeout=60)


def test_unknown_codecs_are_shown_all_the_same() -> None:
    def later(header: blob_pb2.BlobHeader) -> None:
        header.codec.name, header.codec.version = "ferry", 9

    report = report_on(_changed(later), "x")
    assert report.ok  # whole, though this release could not decode it
    assert "ferry.9" in _screen(_changed(later))


def test_low_rank_blobs_and_calibrations_say_what_they_are() -> None:
    page = _screen((GOLDEN / "lowrank.kvferry").read_bytes())
    assert "lowrank.1" in page
    assert "rank={k:12 v:12}" in page
    assert "identity=[3]" in page
    known = (GOLDEN / "calibration_lowrank.kvferry").read_bytes()
    report = report_on(known, "somewhere")
    assert report.ok
    assert report.content["norm"] == "layernorm"
    assert report.content["empty_directions"] == {"v": 2}
    screen = _screen(known)
    assert "rank 16 of 16" in screen
    assert "layernorm before attention leaves 2 heads of v empty" in " ".join(screen.split())
