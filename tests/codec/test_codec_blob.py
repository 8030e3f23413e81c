import dataclasses

import pytest
from codec_samples import (
    MODEL_ID,
    Calibrations,
    meta_for,
    page_of,
    random_calibration,
    random_page,
    rope_spec,
)

from kvferry.codec.base import NoCalibrations, PageTensors
from kvferry.codec.blob import StoredBlob, blob_key, decode_blob, decode_blobs, encode_blob
from kvferry.codec.calibration import CurvePoint
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.registry import codec_names, make_codec, reader
from kvferry.errors import (
    BlobTooLargeError,
    CalibrationCorruptError,
    CalibrationMissingError,
    CodecError,
    ConfigError,
    CorruptBlobError,
    IdentityMismatchError,
    UnknownCodecError,
    UnsupportedVersionError,
)
from kvferry.proto import container
from kvferry.proto.container import Limits
from kvferry.proto.v1 import blob_pb2

KNOWN = random_calibration()
PAGE = page_of(KNOWN, (256, 296))
KEY, DATA = encode_blob(make_codec("ferry", {"step": 0.5}, KNOWN), PAGE, meta_for())
ASK: dict[str, object] = {
    "key": KEY,
    "model_id": MODEL_ID,
    "tokens": (256, 296),
    "cut": None,
    "calibrations": Calibrations(KNOWN),
}
LIVE = {layer: rope_spec(32).fingerprint() for layer in range(2)}


def ask(data: bytes = DATA, **changes: object) -> PageTensors:
    return decode_blob(data, **{**ASK, **changes})  # type: ignore[arg-type]


def resealed(change: "object", data: bytes = DATA) -> bytes:
    """The blob with its header changed and every checksum made to fit."""
    blob = container.parse(data)
    assert callable(change)
    change(blob.header)
    return container.pack(blob.header, list(blob.sections.values()))


def test_key_is_known_before_anything_is_encoded() -> None:
    for name, options in (("raw", {}), ("zstd", {}), ("affine", {"bits": 4})):
        codec = make_codec(name, options)
        page = random_page()
        assert (
            blob_key(codec, meta_for(), (0, 2), (0, 2)) == encode_blob(codec, page, meta_for())[0]
        )
    codec = make_codec("ferry", {"step": "0.5"}, KNOWN)
    assert blob_key(codec, meta_for(), (0, 2), (0, 2)) == KEY
    assert KEY.codec_name == "ferry"


def test_a_good_blob_decodes_with_the_running_models_rope() -> None:
    assert ask(rope=LIVE).layers == (0, 2)
    assert ask(rope={}).layers == (0, 2)
    assert ask(data=memoryview(DATA), rope=LIVE, cut=(1, 2)).layers == (1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": bytes(32)},
        {"tokens": (0, 40)},
        {"tokens": (256, 297)},
        {"key": dataclasses.replace(KEY, page_key=bytes(32))},
        {"key": dataclasses.replace(KEY, layers=(0, 3))},
        {"key": dataclasses.replace(KEY, heads=(1, 3))},
        {"key": dataclasses.replace(KEY, codec_id="ferry.1-" + "0" * 16)},
        {"key": dataclasses.replace(KEY, kind="tail")},
        {"cut": (1, 3)},
        {"cut": (1, 1)},
        {"rope": {1: bytes(32)}},
    ],
)
def test_another_identity_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(IdentityMismatchError):
        ask(**changes)


def test_header_that_contradicts_the_key_is_refused() -> None:
    def other_layers(header: blob_pb2.BlobHeader) -> None:
        header.layer_start, header.layer_end = 1, 3

    def other_model(header: blob_pb2.BlobHeader) -> None:
        header.model_id = bytes(32)

    def other_rope(header: blob_pb2.BlobHeader) -> None:
        header.rope_fingerprint = bytes(32)

    def other_tokens(header: blob_pb2.BlobHeader) -> None:
        header.token_start += 1
        header.token_end += 1

    for change in (other_layers, other_model, other_rope, other_tokens):
        with pytest.raises(IdentityMismatchError):
            ask(resealed(change))


def test_calibration_that_is_missing_or_another_is_named() -> None:
    with pytest.raises(CalibrationMissingError, match="kvferry calibrate"):
        ask(calibrations=NoCalibrations())

    class Liar:
        def get(self, calibration_id: bytes) -> object:
            return random_calibration(seed=8)

    with pytest.raises(CalibrationCorruptError):
        ask(calibrations=Liar())


def test_calibration_of_another_model_or_range_is_refused() -> None:
    foreign = dataclasses.replace(KNOWN, model_id=bytes(32))
    codec = make_codec("ferry", {"step": 0.5}, foreign)
    key, data = encode_blob(codec, PAGE, meta_for())
    with pytest.raises(IdentityMismatchError, match="model"):
        ask(data, key=key, calibrations=Calibrations(foreign))
    moved = dataclasses.replace(KNOWN, layers=(5, 7))

    def claim(header: blob_pb2.BlobHeader) -> None:
        header.codec.calibration_id = moved.id

    data = resealed(claim)
    key = container.key_of(container.read_header(data))
    with pytest.raises(IdentityMismatchError, match="calibration"):
        ask(data, key=key, calibrations=Calibrations(moved))


def test_unknown_and_newer_codecs_are_refused_by_name() -> None:
    def unknown(header: blob_pb2.BlobHeader) -> None:
        header.codec.name = "quantum"

    def newer(header: blob_pb2.BlobHeader) -> None:
        header.codec.version = 9

    for change, error in ((unknown, UnknownCodecError), (newer, UnsupportedVersionError)):
        data = resealed(change)
        with pytest.raises(error):
            ask(data, key=container.key_of(container.read_header(data)))


@pytest.mark.parametrize(
    "params",
    [
        "{}",
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":0}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":-1.0}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":true}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":"0.5"}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":1%s}' % ("0" * 400),
        '{"rank":{"k":25,"v":24},"sinks":4,"step":0.5}',
        '{"rank":{"k":0,"v":24},"sinks":4,"step":0.5}',
        '{"rank":{"k":-1,"v":24},"sinks":4,"step":0.5}',
        '{"rank":{"k":24.0,"v":24},"sinks":4,"step":0.5}',
        '{"rank":{"k":24},"sinks":4,"step":0.5}',
        '{"rank":[24,24],"sinks":4,"step":0.5}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":-1,"step":0.5}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":1000000000000,"step":0.5}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":260,"step":0.5}',
        '{"adapt":0.5,"rank":{"k+v":24},"sinks":4,"step":0.5,"x":1}',
        '{"rank":{"k":23,"v":24},"sinks":4,"step":0.5}',
    ],
)
def test_parameters_that_ferry_does_not_write_are_refused(params: str) -> None:
    def change(header: blob_pb2.BlobHeader) -> None:
        header.codec.params_json = params

    data = resealed(change)
    with pytest.raises(CorruptBlobError):
        ask(data, key=container.key_of(container.read_header(data)))


def test_streams_that_do_not_fit_the_ranges_are_refused() -> None:
    def shape(*numbers: int) -> "object":
        def change(header: blob_pb2.BlobHeader) -> None:
            header.streams[0].shape[:] = numbers

        return change

    def dtype(header: blob_pb2.BlobHeader) -> None:
        header.streams[0].dtype = "float64"

    def twice(header: blob_pb2.BlobHeader) -> None:
        header.streams[1].name = "k"

    def none(header: blob_pb2.BlobHeader) -> None:
        del header.streams[:]

    for change in (
        shape(2, 2, 40),
        shape(2, 2, 40, 0),
        shape(2, 2, 41, 32),
        shape(3, 2, 40, 32),
        shape(2, 3, 40, 32),
        shape(2, 1, 40, 32),
        shape(2, 2, 40, 64),
        shape(2, 2, 40, 2**32 - 1),
        dtype,
        twice,
        none,
    ):
        with pytest.raises(CorruptBlobError):
            ask(resealed(change))


def test_tensors_beyond_the_cap_are_refused_before_they_are_made() -> None:
    with pytest.raises(BlobTooLargeError):
        ask(limits=Limits(max_raw=2 * 2 * 40 * 32 * 4 * 2 - 1))
    assert ask(limits=Limits(max_raw=2 * 2 * 40 * 32 * 4 * 2)).layers == (0, 2)


def test_a_calibration_is_no_page() -> None:
    key, data = KNOWN.to_blob()
    with pytest.raises(IdentityMismatchError):
        ask(data, key=key)


def test_results_stay_aligned_with_what_was_asked() -> None:
    exact = make_codec("raw", {})
    pages = [random_page(tokens=(at, at + 16), seed=at) for at in (0, 16, 32, 48)]
    blobs = []
    for index, page in enumerate(pages):
        key, data = encode_blob(exact, page, meta_for())
        blobs.append(StoredBlob(data if index != 2 else data[:50], key, page.tokens))
    blobs.append(StoredBlob(DATA, KEY, (256, 296)))
    found = decode_blobs(blobs, model_id=MODEL_ID, cut=None, calibrations=Calibrations(KNOWN))
    assert isinstance(found[2], CodecError)
    tokens = [page.tokens for page in found if isinstance(page, PageTensors)]
    assert tokens == [(0, 16), (16, 32), (48, 64), (256, 296)]
    assert decode_blobs([], model_id=MODEL_ID, cut=None, calibrations=NoCalibrations()) == []


def test_registry_reads_options_from_text() -> None:
    known = ("raw", "zstd", "affine", "ferry", "kvtc", "streaming", "random")
    assert set(known) <= set(codec_names())
    assert make_codec("affine", {"bits": "4"}) == make_codec("affine", {"bits": 4})
    assert make_codec("zstd", {"level": "9"}).params == {"level": 9}
    assert make_codec("ferry", {"step": "0.25"}, KNOWN).params["step"] == 0.25
    curve = [CurvePoint(0.1, 3.0, 0.001), CurvePoint(1.0, 1.0, 0.1)]
    step = make_codec("ferry", {"target_kl": "0.01"}, KNOWN, curve).params["step"]
    assert step == pytest.approx(10**-0.5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("ferri", {}, "raw, zstd, affine, bitpack, ferry"),
        ("raw", {"level": 3}, "no options"),
        ("zstd", {"level": "fast"}, "1 to 22"),
        ("zstd", {"level": 23}, "1 to 22"),
        ("affine", {"bits": "5"}, "2, 3, 4, 8"),
        ("affine", {"bit": "4"}, "bits"),
        ("affine", {"bits": None}, "2, 3, 4, 8"),
        ("ferry", {"step": "0"}, "above 0"),
        ("ferry", {"step": "nan"}, "above 0"),
        ("ferry", {"step": "inf"}, "above 0"),
        ("ferry", {"step": "x"}, "above 0"),
        ("ferry", {}, "step or target_kl"),
        ("ferry", {"step": 1, "target_kl": 1}, "step or target_kl"),
        ("ferry", {"target_kl": "0.01"}, "no curve"),
        ("ferry", {"ratio": "8"}, "step, target_kl"),
    ],
)
def test_bad_options_give_one_line_that_lists_what_exists(
    name: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make_codec(name, options, KNOWN)
    assert "\n" not in str(caught.value)


def test_ferry_without_a_calibration_says_so() -> None:
    with pytest.raises(CalibrationMissingError):
        make_codec("ferry", {"step": 1})
    with pytest.raises(CalibrationMissingError):
        reader("ferry", FerryCodec.version).encode(PAGE)
    with pytest.raises(UnsupportedVersionError, match="upgrade"):
        reader("ferry", 9)
    with pytest.raises(UnsupportedVersionError):
        reader("raw", 0)
