"""A blob of low rank, or its calibration, that lies behind good checksums."""

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from codec_samples import decoded, meta_for, page_of, random_calibration, rope_spec
from hostile_samples import damaged, section_lies
from lowrank_samples import low_page, lowrank_calibration

from kvferry.codec import calibration_format as fmt
from kvferry.codec.base import DType
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.entropy import pack_bits
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.registry import make_codec
from kvferry.errors import CalibrationCorruptError, CodecError, CorruptBlobError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.keys import canonical_json

SHAPE = {"layers": (0, 2), "heads": (0, 1), "dim": 8, "inner": 4, "rope": rope_spec(8)}
KNOWN = lowrank_calibration(**SHAPE)  # type: ignore[arg-type]
OTHER = random_calibration(layers=(0, 2), heads=(0, 1), dim=8, rank=4, rope=rope_spec(8))
SMALL = {
    bits: encode_blob(
        make_codec("lowrank", {"rank": 4, "bits": bits, "identity": "1"}, KNOWN),
        low_page(**SHAPE, tokens=(0, 9), dtype=DType.FLOAT16),  # type: ignore[arg-type]
        meta_for(),
    )
    for bits in (8, 16)
}


def decode(bits: int, data: bytes, *, moved: bool = False) -> None:
    """``moved``: ask for the key that the forged header has."""
    key = container.key_of(container.read_header(data)) if moved else SMALL[bits][0]
    decoded(data, key, (0, 9), KNOWN, OTHER)


@pytest.mark.parametrize("bits", list(SMALL))
def test_truncation_at_every_byte_and_a_flip_in_each(bits: int) -> None:
    data = SMALL[bits][1]
    decode(bits, data)
    for bad in damaged(data, flips=1):
        with pytest.raises(CodecError):
            decode(bits, bad)


@pytest.mark.parametrize("bits", list(SMALL))
def test_sections_that_lie(bits: int) -> None:
    data = SMALL[bits][1]
    names = {"k/exact", "v/exact", "v/sinks", "v/q"} | ({"v/scales"} if bits == 8 else set())
    assert set(container.parse(data).sections) == names
    for lie in section_lies(data, pack_bits(np.zeros(1 << 26, dtype=np.uint8))):
        with pytest.raises(CorruptBlobError):
            decode(bits, lie)


Change = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("rank"),
        lambda p: p.update(more=1),
        lambda p: p.update(sinks=-1),
        lambda p: p.update(sinks=5),
        lambda p: p.update(sinks=1 << 40),
        lambda p: p.update(bits=8),
        lambda p: p.update(bits=12),
        lambda p: p.update(bits="16"),
        lambda p: p.update(bits=True),
        lambda p: p.update(rank={}),
        lambda p: p.update(rank=4),
        lambda p: p.update(rank={"v": 3}),
        lambda p: p.update(rank={"v": 0}),
        lambda p: p.update(rank={"v": 9}),
        lambda p: p.update(rank={"v": 1 << 60}),
        lambda p: p.update(rank={"v": 4.0}),
        lambda p: p.update(rank={"k": 4}),
        lambda p: p.update(rank={"v": 4, "latent": 4}),
        lambda p: p.update(identity=[]),
        lambda p: p.update(identity=[0, 1]),
        lambda p: p.update(identity=[2]),
        lambda p: p.update(identity=[1, 1]),
        lambda p: p.update(identity=[-1]),
        lambda p: p.update(identity="1"),
        lambda p: p.update(identity=[True]),
    ],
)
def test_parameters_that_lie(change: Change) -> None:
    blob = container.parse(SMALL[16][1])
    params = container.codec_params(blob.header)
    change(params)
    blob.header.codec.params_json = canonical_json(params).decode()
    with pytest.raises(CorruptBlobError):
        decode(16, container.pack(blob.header, list(blob.sections.values())), moved=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("section", ["v/q", "v/scales"])
def test_coefficients_and_scales_that_are_no_numbers(section: str, value: float) -> None:
    bits = 16 if section == "v/q" else 8
    blob = container.parse(SMALL[bits][1])
    count = blob.sections[section].raw_length // (2 if bits == 16 else 4)
    bad = np.full(count, value, dtype="<f2" if bits == 16 else "<f4")
    forged = SectionData(section, pack_bits(bad), bad.nbytes)
    sections = [forged if s.name == section else s for s in blob.sections.values()]
    with pytest.raises(CorruptBlobError, match=r"NaN or infinite|cannot be"):
        decode(bits, container.pack(blob.header, sections))


def test_calibrations_of_other_codecs_under_its_name_and_the_other_way_round() -> None:
    """Neither decodes to anything: a calibration without bundles would give empty pages."""
    blob = container.parse(SMALL[16][1])
    blob.header.codec.calibration_id = OTHER.id
    with pytest.raises(CorruptBlobError, match="another codec"):
        decode(16, container.pack(blob.header, list(blob.sections.values())), moved=True)
    page = page_of(OTHER, (0, 9), DType.FLOAT16)
    blob = container.parse(
        encode_blob(make_codec("ferry", {"step": 1}, OTHER), page, meta_for())[1]
    )
    blob.header.codec.calibration_id = KNOWN.id
    params = {**container.codec_params(blob.header), "rank": {}}
    blob.header.codec.params_json = canonical_json(params).decode()
    sections = [s for s in blob.sections.values() if s.name.endswith("sinks")]
    with pytest.raises(CorruptBlobError, match="another codec"):
        decode(16, container.pack(blob.header, sections), moved=True)


def forged_calibration(
    change: Callable[[dict[str, object], dict[str, np.ndarray]], object],
) -> bytes:
    """A calibration of other content, with the id that it has."""
    opened = fmt.open_blob(KNOWN.to_blob()[1], fmt.LOWRANK_NAME, container.DEFAULT_LIMITS)
    fields, tensors = dict(opened.fields.values), {n: v.copy() for n, v in opened.tensors.items()}
    change(fields, tensors)
    fields.pop("version")
    framed = fmt.frame(fields, tensors)
    return fmt.to_blob(framed, fmt.LOWRANK_NAME, KNOWN.model_id, KNOWN.layers, KNOWN.heads)


@pytest.mark.parametrize(
    "change",
    [
        lambda f, t: t.pop("v/mean"),
        lambda f, t: t.update({"v/mean": t["v/mean"][:, :, :4].copy()}),
        lambda f, t: t.update({"v/vectors": t["v/vectors"][..., :4].copy()}),
        lambda f, t: t.update({"v/vectors": t["v/vectors"].astype(np.float16)}),
        lambda f, t: t.update({"v/variances": -t["v/variances"]}),
        lambda f, t: t.update({"x/mean": t["v/mean"]}),
        lambda f, t: t.update({"v/vectors": np.zeros((1, 1, 8, 8), np.float32)}),
        lambda f, t: f.update(norm="batchnorm"),
        lambda f, t: f.pop("norm"),
        lambda f, t: f.update(streams=f["streams"][:1]),
        lambda f, t: f["streams"][0].update(null=True),
        lambda f, t: f["streams"][0].update(heads=2),
        lambda f, t: f["streams"][0].update(dim=1 << 40),
        lambda f, t: f["streams"][0].update(name="latent"),
        lambda f, t: f.update(layers=[0, 3]),
        lambda f, t: f.update(more=1),
        lambda f, t: f.update(ropes={"v": [5]}),
    ],
)
def test_calibrations_that_lie(change: Callable[..., object]) -> None:
    assert isinstance(group_from_blob(forged_calibration(lambda f, t: None)), LowRankCalibration)
    with pytest.raises(CalibrationCorruptError):
        group_from_blob(forged_calibration(change))


def test_a_calibration_under_another_codecs_name() -> None:
    framed = fmt.frame({"kind": "group"}, {"x": np.zeros(1, np.float32)})
    for name in (fmt.LOWRANK_NAME, fmt.GROUP_NAME):
        data = fmt.to_blob(framed, name, KNOWN.model_id, KNOWN.layers, KNOWN.heads)
        with pytest.raises(CodecError):
            group_from_blob(data)
    assert safetensors.numpy.load(framed.tensors)["x"].shape == (1,)
