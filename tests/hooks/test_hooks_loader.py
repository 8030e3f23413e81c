"""A restore whose blobs come in any order, late, damaged or not at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_samples import GROUPS, PAGES, RAW, Known, assert_prefix, calibration, load, served

from kvferry.codec.ferry import FerryCodec
from kvferry.errors import BlobNotFoundError, CalibrationMissingError
from kvferry.node.restore import RUN_PAGES


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(2 * PAGES)),
    st.dictionaries(
        st.integers(0, 2 * PAGES - 1), st.sampled_from(["missing", "damaged"]), max_size=3
    ),
)
def test_whatever_fails_the_longest_verified_prefix_is_had(
    order: list[int], failures: dict[int, str]
) -> None:
    client = served(RAW)
    keys = [info.key for page in client.pages for info in page]
    for index, how in failures.items():
        data = client.answers[keys[index]]
        assert isinstance(data, bytes)
        client.answers[keys[index]] = (
            BlobNotFoundError(str(keys[index]))
            if how == "missing"
            else data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
        )
    client.order = lambda asked: [keys[index] for index in order]
    loaded = load(client)
    assert_prefix(loaded, min(failures, default=2 * PAGES) // 2)
    assert bool(loaded.reason) == bool(failures)
    if len(failures) == 1:
        reason = {"missing": "not_found", "damaged": "corrupt"}[next(iter(failures.values()))]
        assert [loaded.reason] == loaded.problems
        assert loaded.reason == reason
    assert client.closed


def test_a_run_is_decoded_while_later_blobs_are_still_on_their_way() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    source = Known(*known)
    overlapped: list[bool] = []

    def before(count: int) -> None:
        if count == RUN_PAGES:  # all of the first layer group's first run has arrived
            overlapped.append(source.used.wait(30))

    client.before = before
    loaded = load(client, source)
    assert overlapped == [True]
    assert loaded.tokens == 16 * PAGES
    assert set(loaded.seconds) == {"lookup", "fetch", "decode"}
    assert loaded.bytes == sum(len(a) for a in client.answers.values() if isinstance(a, bytes))


def test_calibrations_are_read_before_the_first_blob_is_there() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    source = Known(*known)
    early: list[bool] = []
    client.before = lambda count: early.append(source.warmed.wait(30))
    assert load(client, source).tokens == 16 * PAGES
    assert all(early)


def test_a_calibration_that_nobody_has_is_the_reason() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    loaded = load(client, Known(known[0]))
    assert_prefix(loaded, 0)
    assert loaded.reason == CalibrationMissingError("").reason


@pytest.mark.parametrize("gap", [0, 1, RUN_PAGES])
def test_blobs_behind_a_gap_are_not_waited_for(gap: int) -> None:
    client = served(RAW)
    key = client.pages[gap][0].key
    client.answers[key] = BlobNotFoundError(str(key))
    client.order = lambda keys: [key, *(k for k in keys if k != key)]
    loaded = load(client)
    assert_prefix(loaded, gap)
    wanted = {info.key for page in client.pages[:gap] for info in page} | {key}
    assert client.closed
    assert wanted <= set(client.asked)
    if not gap:
        assert client.asked == [key]


def test_answers_that_never_come_are_a_gap() -> None:
    client = served(RAW)
    client.order = lambda keys: keys[:-3]
    loaded = load(client)
    assert 0 < loaded.pages < PAGES
    assert_prefix(loaded, loaded.pages)
    assert loaded.reason == "not_found"
