"""A model that nobody calibrated: affine at once, ferry after enough traffic."""

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.policy import named_policy
from kvferry.cluster.repository import ListQuery
from kvferry.codec.calibration import CalibrationSet, GroupCalibration, layer_groups
from kvferry.codec.calibration_bundle import BundleCalibration, StreamPart
from kvferry.codec.lab.text import default_text
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.mlx.shape import ModelShape, StreamShape
from kvferry.node.calibrations import Calibrations, calibration_folder
from kvferry.node.client import NodeClient
from kvferry.node.hooks.gather import Made
from kvferry.node.hooks.gather_finish import finish_rank
from kvferry.node.hooks.live import Live
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

pytestmark = [pytest.mark.processes, pytest.mark.slow]

WAIT_S = 300.0
LENGTH = 600  # two whole pages, of which one lies behind the window


def letters(number: int) -> list[int]:
    """Text for a model of letters that repeats itself now and then."""
    rng = np.random.default_rng(number)
    words = [rng.integers(1, 27, size=rng.integers(2, 7)).tolist() for _ in range(40)]
    text = [token for word in rng.choice(40, size=300) for token in words[word]]
    return [int(token) for token in text[:LENGTH]]


def prefill(model: LoadedModel, tokens: list[int], cache: list[Any]) -> np.ndarray[Any, Any]:
    for start in range(0, len(tokens), 256):
        logits = model.model(mx.array([tokens[start : start + 256]]), cache=cache)
        mx.eval(logits)
    return np.array(logits[0, -1])


def serve(prefix: PrefixCache, model: LoadedModel, tokens: list[int]) -> np.ndarray[Any, Any]:
    """What a loop does with a prompt."""
    cache, rest = prefix.restore(tokens)
    logits = prefill(model, rest, cache)
    assert prefix.offer(tokens, cache)
    return logits


def wait_for(prefix: PrefixCache, counter: str, count: int = 1, idle_s: float = 0.0) -> None:
    end = time.monotonic() + WAIT_S
    while prefix.counters[counter] < count:
        assert time.monotonic() < end, dict(prefix.counters)
        assert not prefix.counters["gather_bug"]
        if not (idle_s and prefix.idle(idle_s)):
            time.sleep(0.02)


def stored_codecs(cluster: Cluster, model_id: bytes | None) -> Counter[str]:
    """Codec -> blobs of pages in the store."""
    assert model_id is not None
    with NodeClient(cluster.sockets[0]) as client:
        listed = client.list(ListQuery(model_id=model_id, kind="page"))
    return Counter(info.codec.name for info in listed)


def options(cluster: Cluster, folder: Path, **more: Any) -> HookOptions:
    return HookOptions(
        socket=cluster.sockets[0],
        cache_dir=folder,
        gather_tokens=1024,
        gather_passes=2,
        gather_idle_s=0.1,
        **more,
    )


def gather_with_idle_time(
    model: LoadedModel, prompts: list[list[int]], cluster: Cluster, folder: Path
) -> None:
    with PrefixCache(model, options(cluster, folder / "cache")) as prefix:
        assert prefix.ready()
        assert not prefix.idle()
        # The first two are held out for the curve; each of the others gives 512 tokens.
        for number, prompt in enumerate(prompts[:4]):
            serve(prefix, model, prompt)
            wait_for(prefix, "gather_held", min(2, number + 1))
            wait_for(prefix, "gather_tokens", 512 * max(0, number - 1))
            prefix.idle(60.0)
        assert prefix.flush()
        assert set(stored_codecs(cluster, prefix.model_id)) == {"affine"}
        wait_for(prefix, "gather_done", idle_s=5.0)
        assert prefix.counters["gather_passes"] == 2
        assert prefix.model_id is not None
        made, groups = CalibrationSet.load(calibration_folder(folder / "cache", prefix.model_id))
        assert (made.text_source, made.tokens) == ("live traffic", 1024)
        assert made.rates is not None
        assert [text.name for text in made.rates.texts] == ["live 1", "live 2"]
        kl = [point.kl for point in made.curve]
        # Where the basis of so few tokens ends, finer steps hardly tell: up to that noise.
        assert all(finer <= 1.05 * coarser for coarser, finer in itertools.pairwise(kl))
        assert kl[-1] < kl[0]
        assert all(s.weight is not None for group in groups for s in group.streams.values())

        expected = serve(prefix, model, prompts[4])
        assert prefix.flush()
        assert stored_codecs(cluster, prefix.model_id)["ferry"] == len(groups)
        cache, rest = prefix.restore(prompts[4])
        assert len(rest) == 1
        got = prefill(model, rest, cache)
        assert int(got.argmax()) == int(expected.argmax())
        # Pages coded before there was a calibration are still found.
        _, rest = prefix.restore(prompts[0])
        assert len(rest) == 1

    # Another machine, which has seen nothing, takes the calibration from the store.
    with PrefixCache(model, options(cluster, folder / "elsewhere")) as other:
        assert other.ready()
        _, rest = other.restore(prompts[4])
        assert len(rest) == 1
        serve(other, model, prompts[5])
        assert other.flush()
        assert stored_codecs(cluster, other.model_id)["ferry"] == 2 * len(groups)
        assert not other.counters["gather_tokens"]


def test_with_idle_time_weights_and_curve_are_measured_and_old_pages_stay(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    gather_with_idle_time(tiny, [letters(n) for n in range(6)], cluster, tmp_path)


@pytest.mark.model
@pytest.mark.long
def test_the_real_model_gets_one_too(cluster: Cluster, tmp_path: Path) -> None:
    model = load_model("smollm2")
    text = default_text()
    parts = [text[at : at + 9000] for at in range(0, 54_000, 9000)]
    prompts = [model.tokenizer.encode(part)[:LENGTH] for part in parts]
    gather_with_idle_time(model, prompts, cluster, tmp_path)


def test_without_idle_time_one_is_made_all_the_same(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    with PrefixCache(tiny, options(cluster, tmp_path / "cache")) as prefix:
        assert prefix.ready()
        for number in range(4):
            serve(prefix, tiny, letters(number))
            assert prefix.flush()  # what is encoded later may be so with the new calibration
            wait_for(prefix, "gather_held", min(2, number + 1))
            wait_for(prefix, "gather_tokens", 512 * max(0, number - 1))
        wait_for(prefix, "gather_done")
        assert prefix.flush()
        assert prefix.model_id is not None
        made, groups = CalibrationSet.load(calibration_folder(tmp_path / "cache", prefix.model_id))
        assert made.rates is None
        assert len(made.curve) > 3
        assert all(s.weight is None for group in groups for s in group.streams.values())
        serve(prefix, tiny, letters(4))
        assert prefix.flush()
        assert stored_codecs(cluster, prefix.model_id) == {
            "affine": 4 * len(groups),
            "ferry": len(groups),
        }
        _, rest = prefix.restore(letters(4))
        assert len(rest) == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"gather_tokens": 0}, ""), ({"gather_max_bytes": 1000}, "gather_memory")],
)
def test_it_can_be_left_off(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path, more: dict[str, int], reason: str
) -> None:
    given = HookOptions(socket=cluster.sockets[0], cache_dir=tmp_path / "cache", **more)
    with PrefixCache(tiny, given) as prefix:
        assert prefix.ready()
        serve(prefix, tiny, letters(0))
        assert prefix.flush()
        assert not prefix.idle()
        assert stored_codecs(cluster, prefix.model_id) == {"affine": 1}
        assert {name for name in prefix.counters if name.startswith("gather")} == (
            {reason} if reason else set()
        )


def test_a_policy_without_ferry_gathers_nothing(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.set_policy("exact")
    with PrefixCache(tiny, options(cluster, tmp_path / "cache")) as prefix:
        assert prefix.ready()
        end = time.monotonic() + 20
        while prefix.policy.name != "exact":
            assert time.monotonic() < end
            time.sleep(0.02)
        serve(prefix, tiny, letters(0))
        assert prefix.flush()
        assert not any(name.startswith("gather") for name in prefix.counters)


class _Known:
    """What `Live` asks of a `Standing`."""

    model_id = bytes(range(32))
    policy = named_policy("default")


def test_a_rank_with_a_part_of_a_group_leaves_it_to_others(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    counters: Counter[str] = Counter()
    nobody = Calibrations(None, tmp_path)
    live = Live(
        tiny.model,
        describe(tiny.model, tiny.config),
        rope_specs(tiny.model),
        (0, 2),
        HookOptions(socket=tmp_path / "none", cache_dir=tmp_path),
        counters,
        alone=False,
        client=NodeClient(tmp_path / "none"),
        calibrations=lambda: nobody,
        made=lambda: None,
    )
    cache = make_prompt_cache(tiny.model)
    prefill(tiny, letters(0), cache)
    snapshot = adapters.snapshot(cache[:2], LENGTH)
    for _ in range(2):
        live.offered(_Known(), letters(0), snapshot, 0)  # type: ignore[arg-type]
    assert counters == {"gather_split_group": 1}
    assert live.running is None


def wide_group(layers: tuple[int, int], shape: ModelShape) -> GroupCalibration:
    rng = np.random.default_rng(layers[0])
    width = 2 * (layers[1] - layers[0]) * shape.kv_heads * shape.head_dim
    basis, _ = np.linalg.qr(rng.standard_normal((width, 8)))
    both = BundleCalibration(
        parts=tuple(
            StreamPart(name=name, heads=shape.kv_heads, dim=shape.head_dim) for name in ("k", "v")
        ),
        mean=np.zeros(width, np.float32),
        basis=basis.astype(np.float16),
        sigma=np.geomspace(8.0, 0.5, 8).astype(np.float32),
    )
    return GroupCalibration(
        model_id=_Known.model_id,
        layers=layers,
        heads=(0, shape.kv_heads),
        bundles={both.name: both},
        ropes={},
        source="live traffic",
        tokens=1024,
    )


def test_ranks_put_their_groups_together_through_the_store(
    cluster: Cluster, tmp_path: Path
) -> None:
    streams = {name: StreamShape(name, 8, 1024, rotated=False) for name in ("k", "v")}
    shape = ModelShape(2, 8, 1024, streams)
    spans = layer_groups(2, 8, 1024)
    assert len(spans) == 2
    with NodeClient(cluster.sockets[0]) as client:

        def finish(rank: int, patience_s: float = 0.0) -> CalibrationSet | None:
            made = Made([wide_group(spans[rank], shape)], None, 1024)
            folder = tmp_path / f"rank{rank}"
            known = Calibrations(client, folder)
            end = time.monotonic() + patience_s

            def pause(_: float) -> bool:
                time.sleep(0.02)
                return time.monotonic() > end

            return finish_rank(made, _Known.model_id, shape, folder, known, client, pause)

        assert finish(0) is None  # the other rank's group is not there yet
        assert finish(1) is None  # the rank with the first layer does it
        whole = finish(0, patience_s=30.0)  # daemons upload behind the put
        assert whole is not None
        assert [group.layers for group in whole.groups] == spans
        found = Calibrations(client, tmp_path / "rank0").find(_Known.model_id)
        assert found is not None
        assert found.id == whole.id
