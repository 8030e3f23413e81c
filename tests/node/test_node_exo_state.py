"""exo's ``/state``: what is read of it, and that nothing in its place does harm."""

import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from exo_samples import LAPTOP, MODEL, STUDIO, giving, serving, state
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster.member_messages import check_exo
from kvferry.node import exo_watch
from kvferry.node.exo_state import MAX_LINKS, MAX_NODES, read_state
from kvferry.node.exo_watch import ask_exo
from kvferry.proto.v1 import coordinator_pb2 as pb

DOWN = pb.ExoState()


def test_memory_shards_and_links_of_two_macs() -> None:
    with serving(giving(state())) as url:
        found = ask_exo(url)
    assert found.reachable
    assert not found.left_out
    studio, laptop = found.nodes
    assert (studio.node_id, studio.name, studio.chip) == (STUDIO, "studio", "Apple M3 Ultra")
    assert (studio.memory_bytes, studio.free_memory_bytes) == (512 << 30, 300 << 30)
    assert studio.free_disk_bytes == 1 << 40
    assert (laptop.free_disk_bytes, list(laptop.thunderbolt)) == (0, ["Up to 80 Gb/s"])
    told = [
        (s.node_id, s.layer_start, s.layer_end, s.layers, s.rank, s.ranks) for s in found.shards
    ]
    assert told == [(STUDIO, 0, 32, 48, 0, 2), (LAPTOP, 32, 48, 48, 1, 2)]
    assert {(s.model, s.sharding, s.instance) for s in found.shards} == {
        (MODEL, "pipeline", "inst-1")
    }
    assert [(link.source, link.to, link.kind) for link in found.links] == [
        (STUDIO, LAPTOP, "thunderbolt"),
        (STUDIO, LAPTOP, "wifi"),
        (STUDIO, LAPTOP, "rdma"),
    ]


def test_what_is_not_understood_is_left_out_and_counted() -> None:
    odd = state()
    assigned = odd["instances"]["inst-1"]["MlxRingInstance"]["shardAssignments"]
    shards = assigned["runnerToShard"]
    shards["run-a"] = {"NewShardMetadata": {"startLayer": 0, "endLayer": 1, "worldSize": 1}}
    shards["run-b"]["PipelineShardMetadata"]["endLayer"] = 7  # before its start
    shards["run-c"] = shards["run-b"]  # on no node
    odd["topology"]["connections"][STUDIO][LAPTOP].append({"carrierPigeon": True})
    odd["nodeMemory"][STUDIO]["ramTotal"] = {"inBytes": -5}
    odd["nodeIdentities"][STUDIO]["friendlyName"] = "a\x1b[31m\nb" + "c" * 1000
    found = read_state(odd)
    assert not found.shards
    assert found.left_out == 4
    assert found.nodes[0].memory_bytes == 0
    assert found.nodes[0].name.startswith("a[31mbc")
    assert len(found.nodes[0].name) <= 128


def test_a_huge_cluster_is_cut_down_to_what_the_coordinator_takes() -> None:
    many = state()
    names = [f"n{i}" for i in range(MAX_NODES + 10)]
    many["topology"]["nodes"] = names
    many["topology"]["connections"] = {
        name: {LAPTOP: [{"sourceRdmaIface": "x" * 500}] * 20} for name in names
    }
    found = read_state(many)
    assert (len(found.nodes), len(found.links)) == (MAX_NODES, MAX_LINKS)
    assert found.left_out
    check_exo(found)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *state(), "nodes", "connections", "shardAssignments", "nodeToRunner",
                    "runnerToShard", "PipelineShardMetadata", "startLayer", "endLayer",
                    "worldSize", "interfaces", "ramTotal", "inBytes", STUDIO,
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=30,
)  # fmt: skip


@given(_json)
def test_any_json_is_read_without_harm(value: Any) -> None:
    check_exo(read_state(value))


def test_what_is_not_exo_counts_as_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (b"<html>", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"status": "ok"}'):
        with serving(giving(answer)) as url:
            assert ask_exo(url) == DOWN
    with serving(giving(state())) as url:
        assert ask_exo(f"{url}/elsewhere") == DOWN
        monkeypatch.setattr(exo_watch, "MAX_BYTES", 1000)
        assert ask_exo(url) == DOWN
    assert ask_exo("http://127.0.0.1:1") == DOWN


def test_one_that_drips_or_sends_us_elsewhere_is_given_up() -> None:
    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(200):
                request.wfile.write(b" ")
                request.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    with serving(giving(state())) as right:

        def redirect(request: BaseHTTPRequestHandler) -> None:
            request.send_response(302)
            request.send_header("Location", f"{right}/state")
            request.end_headers()

        with serving(redirect) as url:
            assert ask_exo(url) == DOWN
    with serving(drip) as url:
        started = time.monotonic()
        assert ask_exo(url, timeout_s=0.5) == DOWN
        assert time.monotonic() - started < 5.0
