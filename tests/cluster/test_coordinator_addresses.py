"""Which of several coordinators is asked, and which term is believed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster.leader_search import MAX_ADDRESSES, LeaderSearch, parse_addresses
from kvferry.errors import ConfigError, NotLeaderError, StoreUnavailableError

DOWN = StoreUnavailableError("coordinator", "down")


def _standby(leader: str = "") -> NotLeaderError:
    return NotLeaderError("coordinator", leader)


def test_addresses_come_with_commas() -> None:
    assert parse_addresses("a:1, b:2,") == ("a:1", "b:2")
    assert parse_addresses("") == ()  # none yet: it may be found on the network
    with pytest.raises(ConfigError, match="coordinator"):
        parse_addresses("a:1," * (MAX_ADDRESSES + 1))


def test_it_goes_round() -> None:
    search = LeaderSearch(("a:1", "b:2", "c:3"))
    seen = []
    for _ in range(4):
        seen.append(search.address)
        search.failed(search.address, DOWN)
    assert seen == ["a:1", "b:2", "c:3", "a:1"]


def test_a_failure_of_another_call_moves_on_only_once() -> None:
    search = LeaderSearch(("a:1", "b:2"))
    search.failed("a:1", DOWN)
    search.failed("a:1", DOWN)
    assert search.address == "b:2"


def test_it_follows_a_standby_to_the_leader() -> None:
    search = LeaderSearch(("a:1", "b:2", "c:3"))
    search.failed("a:1", _standby("c:3"))
    assert search.address == "c:3"
    search.failed("c:3", _standby("d:4"))  # beyond those configured
    assert search.address == "d:4"
    search.failed("d:4", DOWN)
    assert search.address == "c:3"


def test_one_address_is_asked_once_but_for_a_leader_that_it_names() -> None:
    search = LeaderSearch(("a:1",))
    search.failed("a:1", DOWN)
    assert not search.again
    search.failed("a:1", _standby("b:2"))
    assert search.again
    assert search.address == "b:2"


@pytest.mark.parametrize(
    "leader", ["", "a:1", "b", "b:2/x", "b 2:1", "unix:/x", "b:2,c:3", "x" * 300]
)
def test_nonsense_for_a_leader_is_not_followed(leader: str) -> None:
    search = LeaderSearch(("a:1", "z:9"))
    search.failed("a:1", _standby(leader))
    assert search.address == "z:9"


def test_no_more_leaders_are_followed_than_there_can_be() -> None:
    search = LeaderSearch(("a:1",))
    followed = set()
    for place in range(100):
        search.failed(search.address, _standby(f"b{place}:1"))
        followed.add(search.address)
    assert len(followed) <= MAX_ADDRESSES + 1


@given(st.lists(st.integers(min_value=0, max_value=5), max_size=20))
def test_an_older_term_is_refused_and_none_is_not_one(terms: list[int]) -> None:
    search = LeaderSearch(("a:1",))
    latest = 0
    for term in terms:
        if 0 < term < latest:
            with pytest.raises(NotLeaderError):
                search.heard("a:1", term)
        else:
            search.heard("a:1", term)
        latest = max(latest, term)
        assert search.term == latest
