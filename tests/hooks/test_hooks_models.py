"""Every kind of cache through node daemon and store, and back on another machine."""

from pathlib import Path

import numpy as np
import pytest
from model_zoo import CONFIGS, go_on, prefilled, save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks import HookOptions, PrefixCache

pytestmark = pytest.mark.processes
HYBRID = ("lfm2", "gpt_oss", "gemma3_text", "qwen3_next", "qwen3_5", "nemotron_h")
FIRST, TURN, MORE = 400, 700, 8


@pytest.fixture
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    folder = tmp_path / request.param
    folder.mkdir()
    save_model(request.param, folder)
    return load_model(str(folder))


def opened(cluster: Cluster, model: LoadedModel, folder: Path) -> PrefixCache:
    return PrefixCache(model, HookOptions(socket=cluster.sockets[0], cache_dir=folder))


@pytest.mark.parametrize("loaded", CONFIGS, indirect=True)
def test_a_conversation_goes_on_elsewhere(
    loaded: LoadedModel, exact_cluster: Cluster, tmp_path: Path
) -> None:
    model, tokens = loaded.model, tokens_of(TURN + MORE)
    with opened(exact_cluster, loaded, tmp_path / "here") as here:
        assert here.ready()
        cache = prefilled(model, tokens[:FIRST])
        assert here.offer(tokens[:FIRST], cache)
        assert here.flush()
        assert not [name for name in here.counters if name.startswith("drop")], here.counters

        with opened(exact_cluster, loaded, tmp_path / "there") as there:
            assert there.ready()
            found, rest = there.restore(tokens)
            assert rest == tokens[FIRST:]
            assert there.last_restore is not None
            assert not there.last_restore.reason
            unbroken = go_on(model, cache, tokens[FIRST:], [TURN - FIRST, MORE])
            again = go_on(model, found, tokens[FIRST:], [TURN - FIRST, MORE])
            np.testing.assert_array_equal(again, unbroken)

            # The next turn takes the place of the first one's tail and states.
            cache = prefilled(model, tokens[:TURN])
            assert here.offer(tokens[:TURN], cache)
            assert here.flush()
            _, rest = there.restore(tokens)
            assert rest == tokens[TURN:]

            # Another conversation that leaves this one within the second page.
            fork = tokens[:350] + tokens_of(300, seed=5)
            _, rest = there.restore(fork)
            hybrid = there.last_restore.reason == "no_state"
            assert hybrid == (model.args.model_type in HYBRID)
            assert len(fork) - len(rest) == (0 if hybrid else 256)
