"""A policy that names `lowrank`: its blobs are written, shipped and restored, or give way."""

import json
from pathlib import Path

import pytest
from mlx_lm.models.cache import make_prompt_cache

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.policy import named_policy
from kvferry.cluster.policy_file import dump_policy
from kvferry.cluster.repository import BlobInfo, ListQuery
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.lowrank import LowRankPlan, calibrate, calibration_set
from kvferry.codec.mlx.load import LoadedModel
from kvferry.node.calibrations import Calibrations, calibration_folder
from kvferry.node.client import NodeClient
from kvferry.node.coding import Shard, page_coding
from kvferry.node.hooks import PrefixCache
from kvferry.node.hooks.options import HookOptions
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = pytest.mark.processes

TOKENS = [1 + (i * i + i // 7) % 60 for i in range(700)]


def lowrank_policy(**options: str) -> pb.Policy:
    policy = named_policy("exact")
    policy.name = "low rank"
    del policy.rules[:], policy.accept[:]
    policy.rules.append(pb.LayerRule(codec="lowrank", options=options))
    return policy


def pages(client: NodeClient, model_id: bytes) -> list[BlobInfo]:
    return client.list(ListQuery(model_id=model_id, kind="page"))


def stored(prefix: PrefixCache, model: LoadedModel) -> None:
    cache = make_prompt_cache(model.model)
    prefill(model.model, TOKENS, cache)
    prefix.offer(TOKENS, cache)
    assert prefix.flush()


def test_pages_are_coded_so_and_restored_elsewhere(tiny: LoadedModel, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    policy = lowrank_policy(rank="12", bits="8", identity="0")
    cluster.policy_file.write_text(dump_policy(policy))

    def options(name: str) -> HookOptions:
        return HookOptions(socket=cluster.sockets[0], cache_dir=tmp_path / name, gather_tokens=0)

    with cluster, NodeClient(cluster.sockets[0]) as client:
        with PrefixCache(tiny, options("none")) as prefix:
            assert prefix.ready()
            assert prefix.model_id is not None
            model_id = prefix.model_id
        # The same machine, calibrated.
        plan = LowRankPlan(tokens=700, sequence=700)
        made = calibrate(tiny, model_id, TOKENS, "tests", plan, lambda *_: None)
        calibration_set(made).save(calibration_folder(tmp_path / "a", model_id) / "lowrank", [made])
        with PrefixCache(tiny, options("a")) as prefix:
            assert prefix.ready()
            stored(prefix, tiny)
            written = pages(client, model_id)
            assert {info.codec.name for info in written} == {"lowrank"}
            params = [json.loads(info.codec.params_json) for info in written]
            assert {p["rank"]["v"] for p in params} == {12}
            assert {n for p in params for n in p["identity"]} == {0}
            _, rest = prefix.restore(TOKENS)
            assert len(rest) == 1
        # A machine that has seen nothing finds both blobs and calibration in the cluster.
        with PrefixCache(tiny, options("b")) as other:
            assert other.ready()
            _, rest = other.restore(TOKENS)
            assert len(rest) == 1
        elsewhere = Calibrations(client, tmp_path / "c")
        found = elsewhere.find_lowrank(model_id)
        assert found is not None
        assert (found.id, found.parent) == (made.id, b"")
        # What it is not taken for: the default codec's.
        assert elsewhere.find(model_id) is None


def test_a_shard_of_any_layers_and_heads_has_its_part(tiny: LoadedModel, tmp_path: Path) -> None:
    model_id = bytes(range(32))
    plan = LowRankPlan(tokens=700, sequence=700)
    made = calibrate(tiny, model_id, TOKENS, "tests", plan, lambda *_: None)
    folder = calibration_folder(tmp_path, model_id) / "lowrank"
    calibration_set(made).save(folder, [made])
    known = Calibrations(None, tmp_path)
    whole = known.find_lowrank(model_id)
    assert whole is not None

    def coded(shard: Shard, policy: pb.Policy, lowrank: object = whole) -> list[tuple[object, ...]]:
        found = page_coding(policy, shard, None, known.cut, lowrank=lowrank)  # type: ignore[arg-type]
        return [(part.layers, part.codec.name, dict(part.codec.params)) for part in found]

    part = Shard(
        model_id=model_id, model_layers=3, model_heads=2, head_dim=16, layers=(1, 3), heads=(1, 2)
    )
    policy = lowrank_policy(rank="8")
    ((layers, name, params),) = coded(part, policy)
    assert (layers, name) == ((1, 3), "lowrank")
    assert params == {"bits": 16, "identity": [], "rank": {"v": 8}, "sinks": 4}
    # Without a calibration it gives way as the default codec does.
    assert [name for _, name, _ in coded(part, policy, None)] == ["affine"]
    mixed = lowrank_policy(policy="memory_emergency")
    mixed.rules[0].layer_start = 2
    mixed.rules.insert(0, pb.LayerRule(layer_end=2, codec="zstd"))
    assert [(layers, name) for layers, name, _ in coded(part, mixed)] == [
        ((1, 2), "zstd"),
        ((2, 3), "lowrank"),
    ]
