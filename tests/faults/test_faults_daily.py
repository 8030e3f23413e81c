"""Faults that happen every day, one after the other on one site: part of every test run."""

from pathlib import Path

import pytest
from faults_harness import Hook, Site
from faults_scenarios import DAILY, QUEUE_BYTES, Scenario, queue_full

pytestmark = [pytest.mark.processes, pytest.mark.long]


@pytest.mark.parametrize("scenario", DAILY, ids=lambda scenario: scenario.__name__)
def test_nothing_is_wrong_everything_is_counted_and_it_recovers(
    site: Site, scenario: Scenario
) -> None:
    scenario(site)


def test_the_policy_codes_as_it_says(site: Site) -> None:
    codec = {"exact": "zstd", "default": "ferry"}[site.policy]
    names = [path.name for path in (site.folder / "store" / "blobs").rglob("page-*")]
    assert names
    assert all(codec in name for name in names)


def test_offers_are_dropped_and_counted_when_the_queue_is_full(folder: Path, hook: Hook) -> None:
    options = {"n0": ("--upload-queue-bytes", str(QUEUE_BYTES))}
    with Site(folder, hook, options=options) as site:
        queue_full(site)
