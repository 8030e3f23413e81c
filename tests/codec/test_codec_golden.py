"""Blobs that were written once must decode for ever, to the same numbers."""

import sys
from pathlib import Path

import pytest
from blake3 import blake3

from kvferry.codec.base import PageTensors
from kvferry.codec.blob import decode_blob, encode_blob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.registry import make_codec
from kvferry.proto import container

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))

from codec_samples import Calibrations, bits, restored, worst_error  # noqa: E402
from golden_samples import (  # noqa: E402
    CALIBRATED,
    DROPPED,
    SAMPLES,
    TOKENS,
    golden_calibration,
    golden_page,
    meta,
)


def read(name: str) -> "object":
    data = (GOLDEN / f"{name}.kvferry").read_bytes()
    return decode_blob(
        data,
        key=container.key_of(container.read_header(data)),
        model_id=meta().model_id,
        tokens=TOKENS,
        cut=None,
        calibrations=Calibrations(*(calibration(codec) for codec in CALIBRATED)),
    )


def calibration(codec: str) -> GroupCalibration:
    return group_from_blob((GOLDEN / f"calibration_{codec}.kvferry").read_bytes())


@pytest.mark.parametrize("name", [name for name, _, _ in SAMPLES])
def test_golden_blob_decodes_to_its_recorded_numbers(name: str) -> None:
    found, wanted = read(name), read(f"{name}.restored")
    if name in CALIBRATED:  # matrix products differ in their last bits between machines
        assert worst_error(found, wanted) <= 2.0**-8
    else:
        assert bits(found) == bits(wanted)
    if name in ("raw", "zstd"):
        assert bits(found) == bits(golden_page())


@pytest.mark.parametrize(("name", "options", "kept"), DROPPED)
def test_golden_blobs_that_lack_tokens_give_back_the_others(
    name: str, options: dict[str, object], kept: tuple[int, ...]
) -> None:
    found, page = read(name), golden_page()
    assert isinstance(found, PageTensors)
    assert found.kept is not None
    assert found.kept.positions.tolist() == list(kept)
    assert found.kept.contiguous == ("positions" not in options)
    assert bits(found) == bits(page.take(found.kept.positions))
    again = restored(make_codec(name, options), page)
    assert again.kept is not None
    assert again.kept.positions.tolist() == list(kept)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s[1] in ("raw", "affine", "bitpack")])
def test_sections_of_arithmetic_codecs_are_the_same_on_every_machine(
    sample: tuple[str, str, dict[str, object]],
) -> None:
    name, codec, options = sample
    _, data = encode_blob(make_codec(codec, options), golden_page(), meta())
    golden = container.parse((GOLDEN / f"{name}.kvferry").read_bytes())
    mine = container.parse(data)
    assert {n: bytes(s.data) for n, s in mine.sections.items()} == {
        n: bytes(s.data) for n, s in golden.sections.items()
    }


@pytest.mark.parametrize("codec", CALIBRATED)
def test_calibration_keeps_its_id(codec: str) -> None:
    assert calibration(codec).id == golden_calibration(codec).id


def test_golden_blob_of_merged_tokens_decodes_to_its_recorded_numbers() -> None:
    found = read("centroid")
    assert isinstance(found, PageTensors)
    assert found.kept is not None
    assert found.kept.weights is not None
    assert found.kept.positions.tolist() == [
        [[0, 2, 4, 5, 7, 10, 11, 11]],
        [[0, 1, 4, 5, 5, 7, 10, 11]],
    ]
    assert found.kept.weights.tolist() == [
        [[1.0, 1.0, 2.0, 4.0, 2.0, 1.0, 1.0, 0.0]],
        [[1.0, 1.0, 2.0, 1.0, 3.0, 2.0, 1.0, 1.0]],
    ]
    digests = {n: blake3(d).hexdigest()[:16] for n, d in bits(found).items()}
    assert digests == {"k": "1a22774df7d9042e", "v": "d860c4faa6971f72"}
    # What was merged with nothing is as it was.
    page = golden_page()
    for name, stream in found.streams.items():
        assert (stream.data[:, :, 0] == page.streams[name].data[:, :, 0]).all()
