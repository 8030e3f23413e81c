"""Backend URLs, and names of objects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_samples import ROOT, blob, digest, state, tail

from kvferry.cluster.blob_name import blob_name, name_of
from kvferry.cluster.bucket import layout
from kvferry.cluster.bucket.layout import UnitKey
from kvferry.cluster.bucket.marker import Part, pack_marker, parse_marker
from kvferry.cluster.bucket.url import parse_bucket_url
from kvferry.cluster.convert import info_from_header
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import ConfigError, InvalidKeyError
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2


def info_of(made: tuple[BlobKey, bytes]) -> BlobInfo:
    return info_from_header(container.read_header(made[1]), made[0], len(made[1]))


def test_a_url_says_where_and_how() -> None:
    url = parse_bucket_url("s3://b/some/where?endpoint=https://s3.lan:9000/&region=eu")
    assert (url.bucket, url.prefix, url.endpoint) == ("b", "some/where", "https://s3.lan:9000")
    assert (url.region, url.plain, url.conditional_put) == ("eu", False, True)
    assert parse_bucket_url("s3://b").endpoint == ""
    assert parse_bucket_url("s3://b/?endpoint=http://127.0.0.1:9").plain
    assert parse_bucket_url("s3://b?endpoint=http://nas:9&allow_http=true").plain
    assert not parse_bucket_url("s3://b?conditional_put=false").conditional_put


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "BUCKET"),
        ("s3:///x", "BUCKET"),
        ("http://b", "BUCKET"),
        ("s3://b/../c", "prefix"),
        ("s3://b?endpoint=nas", "endpoint"),
        ("s3://b?endpoint=http://nas", "allow_http"),
        ("s3://b?nonsense=1", "nonsense"),
        ("s3://b?allow_http=yes", "true or false"),
        ("s3://id:secret@b", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_bucket_url(url)
    assert says in str(found.value)
    assert "id:secret" not in str(found.value)


KEYS = st.one_of(
    st.builds(
        lambda kind, page, layers, heads: BlobKey(
            kind, page, layers, heads, "ferry.1-0123456789abcdef"
        ),
        st.sampled_from(["page", "tail", "state"]),
        st.binary(min_size=32, max_size=32),
        st.integers(0, 60_000).map(lambda a: (a, a + 7)),
        st.integers(0, 60_000).map(lambda a: (a, a + 1)),
    ),
    st.binary(min_size=32, max_size=32).map(lambda page: BlobKey("calibration", page)),
)
ENDS = st.integers(0, (1 << 40) - 1)


@given(KEYS, ENDS, st.integers(1, 1 << 40))
def test_paths_lead_back_to_keys(key: BlobKey, ends: int, deadline: int) -> None:
    path = layout.blob_path(key, ends)
    assert layout.parse_blob_path(path) == (key, ends)
    assert path.startswith(UnitKey.of(key).blobs + "/")
    staged = layout.staged_path(key, ends, deadline)
    assert layout.parse_staged_path(staged) == (key, ends, deadline)
    assert staged.startswith(UnitKey.of(key).staged + "/")


@given(KEYS, ENDS)
def test_names_from_parts_are_those_of_keys(key: BlobKey, ends: int) -> None:
    parts = (key.kind, key.page_key, key.layers, key.heads, key.codec_id)
    assert name_of(*parts, ends) == blob_name(key, ends)


@given(st.one_of(st.text(max_size=80), KEYS.map(lambda k: layout.blob_path(k)[:-1])))
def test_other_paths_are_refused(path: str) -> None:
    for parse in (layout.parse_blob_path, layout.parse_staged_path, layout.parse_marker_path):
        with pytest.raises(InvalidKeyError):
            parse(path)


def test_of_what_hangs_on_a_page_the_longest_is_listed_first() -> None:
    infos = [info_of(state(ROOT, f"s{end}", end)) for end in (20, 300, 11, 5_000_000)]
    ordered = sorted(infos, key=layout.marker_path)
    assert [info.tokens[1] for info in ordered] == [5_000_000, 300, 20, 11]
    for info in infos:
        unit, start, end = layout.parse_marker_path(layout.marker_path(info))
        assert (unit, (start, end)) == (UnitKey.of(info.key), info.tokens)


def test_markers_say_what_they_were_given_and_nothing_when_damaged() -> None:
    parts = [Part(info_of(blob(layers=part)), ends) for part, ends in (((0, 2), 0), ((2, 4), 9))]
    unit = UnitKey.of(parts[0].info.key)
    data = pack_marker(parts)
    assert parse_marker(data, unit) == parts
    assert parse_marker(data, UnitKey("page", digest("other"))) is None
    for at in range(len(data)):
        assert parse_marker(data[:at], unit) is None
        assert parse_marker(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], unit) is None


def test_calibrations_have_no_marker_and_tails_have_one_by_their_anchor() -> None:
    calibration = blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION)
    assert layout.marker_path(info_of(calibration)) == ""
    hanging = info_of(tail(digest("anchor"), "t", 512))
    assert layout.marker_path(hanging).startswith(layout.anchored("tail", digest("anchor")))
