"""Merging of similar tokens: the vectorized aggregator against the one that can be read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.centroid_cluster import entries_of, merge, similarity_for
from kvferry.codec.centroid_entries import (
    Grouped,
    energy_loss,
    random_merging,
    reconstruction_loss,
)
from kvferry.codec.centroid_plain import Merging, merge_head
from kvferry.errors import ConfigError


def clustered(
    rows: int, tokens: int, dim: int, centres: int, noise: float, seed: int
) -> np.ndarray:
    """(rows, tokens, dim): a few directions again and again, as text repeats itself."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((rows, centres, dim))
    which = rng.integers(0, centres, (rows, tokens))
    found = np.take_along_axis(middle, which[:, :, None], axis=1)
    return (found + noise * rng.standard_normal((rows, tokens, dim))).astype(np.float32)


def energy_of(
    queries: np.ndarray, keys: np.ndarray, labels: np.ndarray, scale: float
) -> np.ndarray:
    grouped = Grouped.of(labels)
    return energy_loss(queries, keys, grouped.mean(keys), grouped.weights(), scale)


settings_of_merging = st.builds(
    Merging,
    similarity=st.sampled_from([-1.0, 0.0, 0.5, 0.8, 0.95, 1.0]),
    window=st.integers(0, 40),
    init_preserve=st.integers(0, 9),
    flush=st.integers(1, 50),
    persistence=st.integers(0, 4),
    min_merge=st.integers(1, 6),
)


@settings(max_examples=150, deadline=None)
@given(
    how=settings_of_merging,
    rows=st.integers(1, 4),
    tokens=st.integers(1, 130),
    dim=st.sampled_from([1, 2, 8, 33]),
    centres=st.integers(1, 12),
    noise=st.sampled_from([0.0, 0.05, 0.4]),
    seed=st.integers(0, 50),
)
def test_all_heads_at_once_merge_as_each_alone(
    how: Merging, rows: int, tokens: int, dim: int, centres: int, noise: float, seed: int
) -> None:
    keys = clustered(rows, tokens, dim, centres, noise, seed)
    keys[0, tokens // 2] = 0  # has no direction
    together = merge(keys, how)
    for row in range(rows):
        assert (merge_head(keys[row], how) == together[row]).all()


@settings(max_examples=60, deadline=None)
@given(how=settings_of_merging, tokens=st.integers(1, 200), seed=st.integers(0, 20))
def test_entries_hold_every_token_once_and_leave_alone_what_they_should(
    how: Merging, tokens: int, seed: int
) -> None:
    keys = clustered(3, tokens, 16, 5, 0.3, seed)
    labels = merge(keys, how)
    own = np.arange(tokens)
    assert (labels <= own).all()
    assert (np.take_along_axis(labels, labels, axis=1) == labels).all()  # an opener is its own
    alone = (own < how.init_preserve) | (own >= tokens - how.window)
    assert (labels[:, alone] == own[alone]).all()
    assert not np.isin(labels[:, ~alone], own[alone]).any()
    grouped = Grouped.of(labels)
    assert grouped.weights().sum(axis=1) == pytest.approx([tokens] * 3)
    assert ((grouped.weights() > 0).sum(axis=1) == entries_of(labels)).all()
    positions = grouped.positions(100)
    assert (np.diff(positions, axis=1) >= 0).all()
    assert positions.min() >= 100
    assert positions.max() < 100 + tokens


def test_tokens_of_one_direction_become_one_entry_at_their_middle() -> None:
    keys = np.zeros((1, 60, 4), np.float32)
    keys[0, :, 0] = 1
    keys[0, 10:40:2] = [0, 3, 0, 0]
    how = Merging(window=5, init_preserve=2, flush=7, persistence=0)
    grouped = Grouped.of(merge(keys, how))
    assert grouped.weights().tolist() == [[1, 1, 15, 38, 1, 1, 1, 1, 1]]
    assert grouped.mean(keys)[0, 2].tolist() == [0, 3, 0, 0]
    assert grouped.positions(0)[0, 2] == np.arange(10, 40, 2).mean()


def test_an_entry_that_nothing_joins_is_closed() -> None:
    """The same direction before and after a long pause."""
    keys = np.zeros((1, 80, 8), np.float32)
    keys[0, np.arange(80), np.arange(80) // 10] = 1  # eight directions, ten tokens each
    keys[0, 70:] = keys[0, 0]
    merging = {"window": 0, "init_preserve": 0, "flush": 10}
    for persistence, entries in ((0, 7), (7, 7), (6, 8), (1, 8)):
        how = Merging(persistence=persistence, **merging)
        assert entries_of(merge(keys, how)).tolist() == [entries]


def test_small_groups_stay_tokens() -> None:
    keys = np.zeros((1, 10, 3), np.float32)
    keys[0, np.arange(10), [0, 1, 0, 0, 1, 2, 0, 1, 0, 0]] = 1
    how = Merging(window=0, init_preserve=0, flush=10, min_merge=4)
    assert merge(keys, how)[0].tolist() == [0, 1, 0, 0, 4, 5, 0, 7, 0, 0]


@pytest.mark.parametrize("entries", [20, 60, 150])
def test_similarity_is_found_for_a_number_of_entries(entries: int) -> None:
    keys = clustered(6, 300, 16, 40, 0.5, 0)
    how = Merging(window=8, init_preserve=4)
    limit = similarity_for(keys, how, entries)
    count = entries_of(merge(keys, how, limit))
    assert (count <= entries).all()
    assert (count > 0.75 * entries).all()
    assert entries_of(merge(keys, how, np.full(6, 1.0))).tolist() == [300] * 6
    assert (similarity_for(keys, how, 1) == -1).all()  # not even one entry would be so few


def test_what_is_alike_loses_less_than_what_chance_puts_together() -> None:
    keys = clustered(4, 400, 16, 12, 0.3, 1)
    how = Merging(similarity=0.8, window=16)
    labels = merge(keys, how)
    chance = random_merging(labels, how, seed=3)
    a, b = Grouped.of(labels), Grouped.of(chance)
    assert np.sort(a.weights(), axis=1).tolist() == np.sort(b.weights(), axis=1).tolist()
    assert (entries_of(labels) < 100).all()
    untouched = np.r_[0:4, 384:400]
    assert (chance[:, untouched] == untouched).all()
    assert (random_merging(labels, how, seed=3) == chance).all()
    lost, control = reconstruction_loss(keys, labels), reconstruction_loss(keys, chance)
    assert (lost > 0).all()
    assert (lost < 0.5 * control).all()
    queries = np.random.default_rng(5).standard_normal((4, 50, 16)).astype(np.float32)
    moved, control = (energy_of(queries, keys, found, 0.25) for found in (labels, chance))
    assert (moved > 0).all()
    assert (moved < 0.5 * control).all()


def test_equal_tokens_are_merged_for_nothing() -> None:
    """The counts stand in for the copies: no energy moves."""
    keys = clustered(2, 200, 8, 6, 0.0, 2)
    labels = merge(keys, Merging(similarity=0.999, window=10))
    assert (entries_of(labels) <= 20).all()
    assert reconstruction_loss(keys, labels).max() < 1e-12
    queries = np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32)
    assert energy_of(queries, keys, labels, 1.0).max() < 1e-6


def test_nothing_but_a_window_is_nothing_to_merge() -> None:
    keys = clustered(1, 20, 8, 2, 0.0, 0)
    how = Merging(window=20)
    labels = merge(keys, how)
    assert (labels == np.arange(20)).all()
    assert (random_merging(labels, how, 0) == labels).all()


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"similarity": 1.5}, {"window": -1}, {"flush": 0}, {"min_merge": 0}, {"persistence": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Merging(**wrong)
