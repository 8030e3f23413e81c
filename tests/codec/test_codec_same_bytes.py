"""Same page, same calibration: the same bytes on every run and thread count."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from codec_samples import page_of, random_calibration

from kvferry.codec.ferry import FerryCodec
from kvferry.codec.rows import page_rows
from kvferry.codec.settle import settle
from kvferry.codec.transform import project

# A width that OpenBLAS splits otherwise with one thread than with two, pages of one
# token (another routine), and weights.
DIGESTS = """
import sys
from pathlib import Path
from blake3 import blake3
sys.path.insert(0, sys.argv[1])
from codec_samples import meta_for, page_of, random_calibration, random_page
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.registry import make_codec
known = [GroupCalibration.from_blob(Path(p).read_bytes()) for p in sys.argv[2:]]
for calibration in known:
    for name, options in (
        ("ferry", {"step": 0.02}), ("raw", {}), ("zstd", {}), ("affine", {"bits": 4}),
        ("bitpack", {}), ("centroid", {"ratio": 4, "window": 8}),
    ):
        codec = make_codec(name, options, calibration if name in ("ferry", "centroid") else None)
        hasher = blake3()
        for seed, span in enumerate([(0, 256), (256, 512), (512, 513), (513, 516), (600, 900)]):
            page = page_of(calibration, span, seed=seed)
            rough = random_page(
                layers=page.layers, heads=page.heads, tokens=span,
                dim=page.streams["k"].data.shape[3], seed=seed, scale=2.0,
            )
            hasher.update(encode_blob(codec, rough, meta_for())[1])
        print(name, hasher.hexdigest())
"""
CORES = ["", "Haswell"] if platform.machine() == "x86_64" else [""]


@pytest.mark.processes
def test_same_bytes_on_every_run_thread_count_and_kernel(tmp_path: Path) -> None:
    paths = []
    for index, (heads, dim, weighted) in enumerate([(5, 100, False), (3, 64, True)]):
        known = random_calibration(
            layers=(0, 2), heads=(0, heads), dim=dim, rank=200, weighted=weighted, importance=True
        )
        paths.append(tmp_path / f"{index}.kvferry")
        paths[-1].write_bytes(known.to_blob()[1])
    here = str(Path(__file__).parent)
    found: dict[str, str] = {}
    for core in CORES:
        for threads in ("1", "3"):
            environment = {
                **os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads,
                "OPENBLAS_CORETYPE": core,
            }  # fmt: skip
            command = [sys.executable, "-c", DIGESTS, here, *map(str, paths)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            found[f"{core} {threads}"] = done.stdout
    assert len(set(found.values())) == 1, found


def test_levels_at_an_edge_are_those_of_float64() -> None:
    known = random_calibration(layers=(0, 4), heads=(0, 3), dim=64, rank=300)
    bundle = known.bundles["k+v"]
    rows = page_rows(page_of(known, (4, 260)), ["k", "v"], known.ropes, 4)
    by = bundle.fold.forward
    exact = rows.astype(np.float64) @ by.matrix.astype(np.float64) - by.offset
    for step in (2e-3, 1e-5):  # few and nearly all levels near an edge
        steps = np.full(256, step, dtype=np.float32)
        levels = project(rows, bundle.fold, bundle.rank) * np.float32(1 / step)
        plain = np.rint(levels)
        settle(levels, rows, by, steps)
        wanted = np.rint(exact / steps[:, None])
        assert (np.rint(levels) == wanted.astype(np.float32)).all()
        assert (plain != wanted).any()  # or this test shows nothing
    assert FerryCodec(0.5, known).encode(page_of(known, (0, 20)))
