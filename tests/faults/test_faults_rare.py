"""The rest of the faults; not in every test run (``pytest -m faults``)."""

import json
import os
import signal
from pathlib import Path

import faults_machine
import pytest
from faults_harness import Hook, Site, wait_for
from faults_scenarios import RARE, Scenario, _counted

from kvferry.cluster.authority import Authority

pytestmark = [pytest.mark.processes, pytest.mark.faults]
MIB = 1 << 20


@pytest.mark.parametrize("scenario", RARE, ids=lambda scenario: scenario.__name__)
def test_nothing_is_wrong_everything_is_counted_and_it_recovers(
    site: Site, scenario: Scenario
) -> None:
    scenario(site)


def test_the_stores_disk_is_full(folder: Path, hook: Hook) -> None:
    with (
        faults_machine.small_disk(folder / "store", 12 * MIB) as disk,
        Site(folder, hook) as site,
    ):
        site.offer("n0", 1)
        filler = faults_machine.fill(disk)
        with _counted(site.nodes[0], "refused_full", "unavailable", "full"):
            for number in (2, 3):
                site.request("n0", number, offer=True, flush=5.0)
        site.hit("n1", 1)  # what it has, it still serves
        filler.unlink()
        site.offer("n1", 4)
        site.hit("n0", 4)


def test_a_nodes_disk_is_full(folder: Path, hook: Hook) -> None:
    with (
        faults_machine.small_disk(folder / "n0", 6 * MIB) as disk,
        Site(folder, hook) as site,
    ):
        filler = faults_machine.fill(disk)
        with _counted(site.nodes[0], "full", "unavailable"):
            reply = site.request("n0", 1, offer=True, flush=5.0)
        assert reply["offer_s"] < 2.0
        filler.unlink()
        site.offer("n0", 2)
        site.hit("n1", 2)


def test_the_stores_folder_turns_read_only(folder: Path, hook: Hook) -> None:
    wrap = faults_machine.without_overrides()
    with Site(folder, hook) as site:
        site.store.kill()
        site.store.wrap = wrap
        site.store.start()
        site.offer("n0", 1)
        with faults_machine.read_only(folder / "store"):
            with _counted(site.store, "unavailable", "failed"):
                site.request("n0", 2, offer=True, flush=3.0)
            site.forget("n1")
            site.hit("n1", 1)
        wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
        site.offer("n1", 3)
        site.hit("n0", 3)


def test_clocks_jump(folder: Path, hook: Hook) -> None:
    clocks = {name: faults_machine.Clock(folder) for name in ("store", "coordinator", "n1")}
    environment = {name: clock.environment for name, clock in clocks.items()}
    with Site(folder, hook, environment=environment) as site:
        site.offer("n0", 1)
        for number, jump in enumerate((3600, -3600, 30 * 86_400, -30 * 86_400, 0), start=2):
            for clock in clocks.values():
                clock.jump(jump)
            site.offer("n0", number)
            # Tails end by the clock, pages do not.
            reply = wait_for(
                lambda: found if (found := site.request("n1", 1))["restored"] >= 768 else None
            )
            assert reply["restored"] in (768, 899)
            site.offer("n1", 10 + number)
            for name in ("n0", "n1"):
                site.joined(name)


def test_clocks_of_the_services_are_the_ones_that_jump(folder: Path, hook: Hook) -> None:
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    clock = faults_machine.Clock(folder)
    with Site(folder, hook, environment={"store": clock.environment}) as site:
        import time

        with SyncBlobStoreClient(site.store.address) as client:
            assert abs(client.stat().unix_s - time.time()) < 60
            clock.jump(86_400)
            assert client.stat().unix_s - time.time() > 80_000


def test_a_machine_behind_a_real_network_is_cut_off(
    folder: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network namespace, TLS and tokens: as between two machines."""
    wire = faults_machine.Wire()
    try:
        authority = Authority.create(folder / "ca")
        bundle = authority.issue("machine", [wire.near, wire.far])
        monkeypatch.setenv("KVFERRY_SECURITY_TLS_DIR", str(bundle))
        with Site(folder, hook) as site:
            far = site.nodes[1]
            far.kill()
            store, coordinator = site.store, site.coordinator
            for service in (store, coordinator):
                service.kill()
                _set(service, "--listen", f"{wire.near}:{service.address.rpartition(':')[2]}")
                service.start()
            near = site.nodes[0]
            near.kill()
            _set(near, "--listen", f"{wire.near}:{near.address.rpartition(':')[2]}")
            _set(far, "--listen", f"{wire.far}:{far.address.rpartition(':')[2]}")
            for node in (near, far):
                _set(node, "--store", store.address)
                _set(node, "--coordinator", coordinator.address)
            far.wrap = wire.prefix
            near.start()
            far.start()
            for name in ("n0", "n1"):
                site.joined(name)
            site.offer("n0", 1)
            site.hit("n1", 1)
            wire.cut(True)
            try:
                reply = site.request("n1", 2, offer=True)
                assert reply["restore_s"] < 20
            finally:
                wire.cut(False)
            site.hit("n0", 2)
            if wire.slow("2mbit"):
                site.offer("n0", 3)
                reply = site.request("n1", 3)
                assert reply["restore_s"] < 20
                wire.slow("")
            site.hit("n1", 2)
    finally:
        wire.close()


def _set(service: object, option: str, value: str) -> None:
    command = service._command  # type: ignore[attr-defined]
    command[command.index(option) + 1] = value


def test_killed_twice_in_the_middle_of_everything(folder: Path, hook: Hook) -> None:
    with Site(folder, hook) as site:
        for number in range(1, 5):
            site.request("n0", number, offer=True)
            for service in (site.store, site.nodes[0]):
                service.send(signal.SIGKILL)
                service.process.wait()
            site.request("n0", number, policy="", policy_s=0.0)
            for service in (site.store, site.nodes[0]):
                service.start()
            site.joined("n0")
            site.request("n1", number)
        wait_for(lambda: site.nodes[0].metrics()["kvferry_node_uploads_pending"] == 0)
        site.offer("n1", 9)
        site.hit("n0", 9)
        assert json.loads((folder / "n0.ready.json").read_text())["pid"] != os.getpid()
