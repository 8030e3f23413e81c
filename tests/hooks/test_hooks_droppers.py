"""Pages that lack tokens are stored, and never put back into a live cache."""

import time
from pathlib import Path

import mlx.core as mx
import pytest
from loader_samples import PAGES, RAW, ROOT, Served, assert_prefix, load, served, whole

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.policy import dump_policy, named_policy
from kvferry.cluster.repository import ListQuery, LookupQuery, LookupResult
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.registry import make_codec
from kvferry.errors import IdentityMismatchError
from kvferry.node.client import NodeClient
from kvferry.node.hooks.gap import Surroundings, gap_of
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.restore import Assembly
from kvferry.proto.v1 import coordinator_pb2 as pb

DROPPED = (make_codec("streaming", {"ratio": 4}), make_codec("streaming", {"ratio": 4}))
LENGTH = 640


class Choosing(Served):
    """Answers by codec, as a store does: complete pages only."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        pages = []
        for page in self.pages:
            taken = [b for b in page if not query.codecs or b.key.codec_name in query.codecs]
            if not taken:
                break
            pages.append(taken)
        return LookupResult(pages=pages, tails=[], states=[])


def test_pages_that_lack_tokens_are_a_miss_before_anything_is_fetched() -> None:
    client = served(DROPPED)
    loaded = load(client)
    assert (loaded.tokens, loaded.reason) == (0, "lacks_tokens")
    assert client.asked == []
    assert loaded.bytes == 0


@pytest.mark.parametrize("whole_pages", [2, PAGES])
def test_of_two_codings_the_one_that_has_all_tokens_is_taken(whole_pages: int) -> None:
    first, second = served(DROPPED), served(RAW)
    pages = [
        [*a, *(b if index < whole_pages else [])]
        for index, (a, b) in enumerate(zip(first.pages, second.pages, strict=True))
    ]
    client = Choosing(pages, first.answers | second.answers)
    loaded = load(client)
    assert_prefix(loaded, whole_pages)
    assert {key.codec_name for key in client.asked} == {"raw"}
    assert loaded.reason == ""


def test_an_assembly_takes_no_page_that_lacks_tokens() -> None:
    page = whole().take(range(10))  # type: ignore[arg-type]
    with pytest.raises(IdentityMismatchError, match="tokens"):
        Assembly(page.tokens[1], page.layers, page.heads).add(page)


def prompt(seed: int) -> list[int]:
    return [(seed * 7919 + 31 * i + i * i) % 61 for i in range(LENGTH)]


def put(cluster: Cluster, policy: pb.Policy, prefix: PrefixCache | None = None) -> None:
    cluster.policy_file.write_text(dump_policy(policy))
    end = time.monotonic() + 20
    while prefix is not None and prefix.policy.name != policy.name:
        assert time.monotonic() < end, f"policy did not arrive: {prefix.policy.name}"
        time.sleep(0.02)


@pytest.mark.processes
def test_a_policy_that_drops_tokens_stores_pages_that_no_restore_takes(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    dropping = pb.Policy(
        name="dropping",
        rules=[pb.LayerRule(codec="streaming", options={"ratio": "4"})],
        when=[pb.TRIGGER_AFTER_PREFILL],
        tail=pb.TailRule(codec="recompute", ttl_s=60),
        idle_s=60,
        memory_mark=1.0,
    )
    cluster = Cluster(tmp_path, nodes=1)
    put(cluster, dropping)
    with cluster:
        options = HookOptions(socket=cluster.sockets[0], cache_dir=tmp_path, always_restore=True)
        with PrefixCache(tiny, options) as prefix:
            assert prefix.ready()
            put(cluster, dropping, prefix)
            tokens = prompt(1)
            cache, rest = prefix.restore(tokens)
            assert rest == tokens
            mx.eval(tiny.model(mx.array([tokens]), cache=cache))
            assert prefix.offer(tokens, cache)
            assert prefix.flush()
            with NodeClient(cluster.sockets[0]) as client:
                held = client.list(ListQuery(kind="page"))
            assert {info.key.codec_name for info in held} == {"streaming"}
            assert {info.tokens for info in held} == {(0, 256), (256, 512)}

            _, rest = prefix.restore(tokens)
            assert rest == tokens
            report = prefix.last_restore
            assert report is not None
            assert (report.reason, report.bytes) == ("lacks_tokens", 0)
            assert prefix.counters["miss_lacks_tokens"] == 1

            # Under another policy the same prompt is stored with all its tokens beside it.
            put(cluster, named_policy("exact"), prefix)
            assert prefix.offer(tokens, cache)
            assert prefix.flush()
            _, rest = prefix.restore(tokens)
            assert len(rest) == 1


def test_explain_says_that_tokens_were_dropped() -> None:
    around = Surroundings(
        model_id=b"m" * 32, root=ROOT, holders={}, of_model=lambda: [], others=lambda: {}
    )
    gap = gap_of(0, ROOT, served(DROPPED).pages[0], around)
    assert gap.state == "lacks_tokens"
    assert "stored as streaming, which drops tokens" in gap.why
    part = [served(RAW).pages[0][0], *served(DROPPED).pages[0]]
    gap = gap_of(0, ROOT, part, around)
    assert (gap.state, gap.why) == ("incomplete", "layers 2-3 of 4 are missing")
