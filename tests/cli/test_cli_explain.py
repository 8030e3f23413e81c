"""`kvferry explain` with real daemons and a small model: what is there, what is not, and why."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import model_zoo
import numpy as np
import pytest
import typer
from tiny_llama import save_model, sharp_llama
from typer.testing import CliRunner

from kvferry.cli import explain as command
from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, encode_blob
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError, FerryError, StoreUnavailableError
from kvferry.node.client import NodeClient
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

pytestmark = [pytest.mark.processes]


def letters(count: int, seed: int) -> str:
    """A prompt of so many tokens."""
    return bytes(np.random.default_rng(seed).integers(97, 123, count, dtype=np.uint8)).decode()


KNOWN = letters(700, 1)  # two pages, and a tail of 188


def folder_of(name: str, parent: Path, factor: float = 1.0) -> Path:
    """A model folder; another factor is another model."""
    folder = parent / name
    folder.mkdir()
    model, config = sharp_llama(27)
    model.lm_head.weight = model.lm_head.weight * factor
    save_model(model, config, folder)
    return folder


class Setting:
    """A cluster that has `KNOWN` of a small model."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.model = folder_of("model", folder)

    def offer(self, text: str) -> None:
        loaded: LoadedModel = load_model(str(self.model))
        options = HookOptions(socket=self.cluster.sockets[0], cache_dir=self.folder / "cache")
        with PrefixCache(loaded, options) as prefix:
            assert prefix.ready()
            wait_policy(prefix, "exact")
            tokens = loaded.tokenizer.encode(text)
            cache, rest = prefix.restore(tokens)
            mx.eval(loaded.model(mx.array([rest]), cache=cache))
            assert prefix.offer(tokens, cache)
            assert prefix.flush()

    def explain(self, text: str, *more: str, model: Path | None = None) -> dict[str, Any]:
        prompt = self.folder / "prompt.txt"
        prompt.write_text(text)
        socket = str(self.cluster.sockets[0])
        given = [str(prompt), "--model", str(model or self.model), "--socket", socket, *more]
        status, out = run(*given, "--coordinator", "", "--json", "-")
        assert status == 0, out
        found: dict[str, Any] = json.loads(out)
        return found


def wait_policy(prefix: PrefixCache, name: str) -> None:
    end = time.monotonic() + 20
    while prefix.policy.name != name:
        assert time.monotonic() < end, f"policy {name} did not arrive"
        time.sleep(0.02)


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, FerryError):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("explain")
    cluster = Cluster(folder, nodes=1)
    cluster.set_policy("exact")
    with pytest.MonkeyPatch.context() as patch, cluster:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = Setting(cluster, folder)
        made.offer(KNOWN)
        yield made


def states(found: dict[str, Any]) -> list[str]:
    return [page["state"] for page in found["pages"]]


def test_a_prompt_that_is_stored_is_found_whole(setting: Setting) -> None:
    found = setting.explain(KNOWN)
    assert states(found) == ["complete", "complete"]
    assert found["restorable_tokens"] == 700
    assert found["ends"] == "all of the prompt is there"
    (tail,) = found["tails"]
    assert (tail["tokens"], tail["why"]) == ([512, 700], "")
    for part in [*found["pages"], *found["tails"]]:
        assert sum(b["layers"][1] - b["layers"][0] for b in part["blobs"]) == 3
        assert all({"memory", "disk", "store"} <= set(b["places"]) for b in part["blobs"])
    bytes_of = sum(b["bytes"] for p in [*found["pages"], tail] for b in p["blobs"])
    last = found["restores"][-1]
    assert last["near_bytes"] + last["far_bytes"] == bytes_of


def test_what_a_restore_brings_is_what_it_said(setting: Setting) -> None:
    text = KNOWN[:600] + letters(200, 2)
    found = setting.explain(text)
    loaded = load_model(str(setting.model))
    options = HookOptions(
        socket=setting.cluster.sockets[0], cache_dir=setting.folder / "cache", always_restore=True
    )
    with PrefixCache(loaded, options) as prefix:
        assert prefix.ready()
        wait_policy(prefix, "exact")
        tokens = loaded.tokenizer.encode(text)
        _, rest = prefix.restore(tokens)
    assert len(tokens) - len(rest) == found["restorable_tokens"] == 512


def test_where_the_tokens_differ_is_told(setting: Setting) -> None:
    other = "a" if KNOWN[300] != "a" else "b"
    found = setting.explain(KNOWN[:300] + other + KNOWN[301:])
    assert states(found) == ["complete", "missing"]
    assert found["restorable_tokens"] == 256
    assert "tokens 256-511" in found["ends"]
    assert "goes on here with other tokens" in found["ends"]
    assert "begin with other tokens" in setting.explain(letters(600, 9))["ends"]


def test_a_prompt_that_goes_on_uses_the_tail(setting: Setting) -> None:
    found = setting.explain(KNOWN + letters(100, 3))
    assert found["restorable_tokens"] == 700
    assert states(found) == ["complete", "complete", "missing"]
    assert "tail ends at token 700" in found["ends"]
    found = setting.explain(KNOWN[:600])
    assert found["restorable_tokens"] == 512
    assert "beyond this prompt" in found["ends"]


def test_another_model_has_another_id(setting: Setting) -> None:
    found = setting.explain(KNOWN, model=folder_of("other", setting.folder, 1.25))
    assert found["restorable_tokens"] == 0
    assert "nothing of this model id" in found["ends"]
    assert setting.explain(KNOWN)["model_id"][:16] in found["ends"]


def put_page(setting: Setting, text: str, layers: tuple[int, int], codec: str) -> None:
    """One page's blob of noise, of some layers, right before what ``text`` lacks."""
    found = setting.explain(text)
    index = states(found).index("missing")
    previous = found["pages"][index - 1]["key"] if index else found["root"]
    values = np.random.default_rng(4).standard_normal((layers[1] - layers[0], 2, 256, 16))
    data = values.astype(np.float32)
    streams = {name: Stream(name, data, DType.FLOAT32) for name in ("k", "v")}
    page = PageTensors(layers, (0, 2), (256 * index, 256 * (index + 1)), streams)
    meta = BlobMeta(
        kind="page",
        model_id=bytes.fromhex(found["model_id"]),
        page_key=bytes.fromhex(found["pages"][index]["key"]),
        previous_key=bytes.fromhex(previous),
        model_layers=3,
        model_heads=2,
    )
    key, blob = encode_blob(make_codec(codec, {"bits": 8} if codec == "affine" else {}), page, meta)
    with NodeClient(setting.cluster.sockets[0]) as client:
        client.put(key, blob)
        assert client.flush()


def test_layers_that_no_rank_has_stored_are_named(setting: Setting) -> None:
    text = letters(700, 5)
    put_page(setting, text, (0, 1), "raw")
    put_page_again = setting.explain(text)
    assert states(put_page_again) == ["incomplete", "missing"]
    assert "layers 1-2 of 3 are missing" in put_page_again["ends"]


def test_a_codec_that_the_policy_does_not_accept_is_named(setting: Setting) -> None:
    text = letters(700, 6)
    put_page(setting, text, (0, 3), "affine")
    found = setting.explain(text)
    assert states(found)[0] == "other_codec"
    assert "stored as affine" in found["ends"]
    assert "'exact' accepts" in found["ends"]


def test_prefill_that_is_quicker_is_told_with_numbers(setting: Setting) -> None:
    slow = setting.explain(KNOWN, "--prefill-rate", "10", "--link-rate", "1")
    assert slow["worth_tokens"] == 700
    assert slow["restores"][-1]["prefill_seconds"] == pytest.approx(70.0)
    quick = setting.explain(KNOWN, "--prefill-rate", "1e9")
    assert quick["worth_tokens"] == 0


def test_the_screen_says_it_in_words(setting: Setting) -> None:
    prompt = setting.folder / "screen.txt"
    prompt.write_text(KNOWN)
    socket = str(setting.cluster.sockets[0])
    status, out = run(
        str(prompt), "--model", str(setting.model), "--socket", socket, "--coordinator", "",
        "--prefill-rate", "10",
    )  # fmt: skip
    assert status == 0
    words = " ".join(out.split())
    assert "A restore can bring 700 of 700 tokens" in words
    assert "It is worth it" in words
    assert out.count("complete") == 3


def test_a_store_that_is_gone_is_said(setting: Setting) -> None:
    store = setting.cluster.service("store")
    store.process.send_signal(signal.SIGSTOP)
    try:
        found = setting.explain(KNOWN)
    finally:
        store.process.send_signal(signal.SIGCONT)
    assert found["partial"]
    assert found["silent"] == ["store"]
    assert found["restorable_tokens"] == 700  # this node has it all


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (b"[1, 2, 999]", "token id"),
        (b"[[1]]", "token ids"),
        (b'{"no": 1}', "vocabulary"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'[{"role": "user", "content": "hi"}]', "template"),
    ],
)
def test_prompts_that_are_none(setting: Setting, prompt: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_bytes(prompt)
    arguments = [str(file), "--model", str(setting.model)]
    socket = ["--socket", str(setting.cluster.sockets[0])]
    if says == "vocabulary":  # JSON that is no prompt is text like any other
        assert run(*arguments, *socket, "--coordinator", "", "--json", "-")[0] == 0
        return
    with pytest.raises(ConfigError, match=says) as caught:
        run(*arguments, *socket)
    assert "\n" not in str(caught.value)


def test_without_a_node_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="kvferry up"):
        run("x", "--socket", str(tmp_path / "none.sock"))


def test_a_model_with_states_is_restored_where_they_stand(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "hybrid"
    folder.mkdir()
    model_zoo.save_model("qwen3_next", folder)
    text = letters(700, 8)
    assert setting.explain(text, model=folder)["restorable_tokens"] == 0
    loaded = load_model(str(folder))
    options = HookOptions(socket=setting.cluster.sockets[0], cache_dir=setting.folder / "cache")
    with PrefixCache(loaded, options) as prefix:
        assert prefix.ready()
        wait_policy(prefix, "exact")
        tokens = loaded.tokenizer.encode(text)
        cache = model_zoo.prefilled(loaded.model, tokens[:690])
        assert prefix.offer(tokens[:690], cache)
        assert prefix.flush()
        found = setting.explain(text, model=folder)
        _, rest = prefix.restore(tokens)
    assert len(tokens) - len(rest) == found["restorable_tokens"] == 690
    assert [state["tokens"] for state in found["states"]] == [[512, 690]]
    shorter = setting.explain(text[:600], model=folder)
    assert shorter["restorable_tokens"] == 0
    assert "recurrent state" in shorter["ends"]
