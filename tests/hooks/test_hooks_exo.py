"""exo's prefix cache with kvferry behind it, against a fake that keeps exo's contract."""

import logging
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exo_contract
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.policy import named_policy
from kvferry.cluster.policy_file import dump_policy
from kvferry.codec.mlx.load import load_model
from kvferry.node.hooks import HookOptions
from kvferry.node.hooks.exo.checks import engine_problem, supervisor_problem
from kvferry.node.hooks.exo.child import install
from kvferry.node.hooks.exo.launch import take_hold
from kvferry.node.hooks.exo.prefix import KEEP_LAST
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = pytest.mark.processes
MODELS = ["llama", "deepseek_v3", "gpt_oss", "lfm2", "qwen3_next"]
HYBRID = ("gpt_oss", "lfm2", "qwen3_next")
PROMPT = 600
IMAGE_TOKEN = 95


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


def modules() -> Any:
    """A fresh copy of the fake, as a new runner process would import it."""
    made = types.ModuleType("exo_copy")
    source = Path(exo_contract.__file__).read_text()
    exec(compile(source, exo_contract.__file__, "exec"), made.__dict__)  # noqa: S102
    return made


class Runner:
    """One process of a runner: modules of its own, and what they build."""

    def __init__(
        self, folder: Path, cluster: Cluster, cache_dir: Path, eyes: Path | None = None
    ) -> None:
        self.exo = exo = modules()
        options = HookOptions(
            socket=cluster.sockets[0], cache_dir=cache_dir, keep_last=KEEP_LAST, gather_tokens=0
        )
        logger = SimpleNamespace(
            warning=logging.warning, info=logging.info, opt=lambda **_: logging.getLogger()
        )
        install(exo, exo, exo, options, logger, exo if eyes else None)
        loaded = load_model(str(folder))
        vision = exo.VisionProcessor(str(eyes), IMAGE_TOKEN) if eyes else None
        builder = exo.MlxBuilder(loaded.model, loaded.tokenizer, vision_processor=vision)
        self.vision = vision
        list(builder.load(exo_contract.shard(folder, len(loaded.model.layers))))
        self.engine = builder.build()
        self.model = loaded.model
        self.ferry = self.engine.kv_prefix_cache.ferry
        assert self.ferry is not None
        assert self.ferry.ready()

    def expected(self, prompt: list[int]) -> np.ndarray:
        """Without any cache, in the same chunks."""
        cache = make_prompt_cache(self.model)
        for start in range(0, len(prompt) - 2, exo_contract.CHUNK):
            part = prompt[start : min(len(prompt) - 2, start + exo_contract.CHUNK)]
            mx.eval(self.model(mx.array([part]), cache=cache))
        return np.array(self.model(mx.array([prompt[-2:]]), cache=cache)[0, -1])

    def submit(self, prompt: list[int], media: Any = None) -> tuple[np.ndarray, int]:
        logits, hit = self.engine.submit(prompt, media)
        assert self.ferry.flush()
        return np.array(logits), hit


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    folder.mkdir()
    save_model(request.param, folder)
    return folder


def test_a_prompt_seen_by_one_runner_is_restored_by_another(
    folder: Path, cluster: Cluster, tmp_path: Path
) -> None:
    prompt = tokens_of(PROMPT)
    first = Runner(folder, cluster, tmp_path / "a")
    logits, hit = first.submit(prompt)
    assert hit == 0
    np.testing.assert_array_equal(logits, first.expected(prompt))
    assert first.submit(prompt)[1] > 0  # exo's own entry serves it

    second = Runner(folder, cluster, tmp_path / "b")
    logits, hit = second.submit(prompt)
    assert hit == PROMPT - 2
    np.testing.assert_array_equal(logits, first.expected(prompt))
    # It has become one of exo's own entries.
    assert len(second.engine.kv_prefix_cache.prompts) == 1
    assert second.ferry.counters["restores"] == 1
    second.submit(prompt)
    if folder.name not in HYBRID:  # exo has no snapshot of its own to go on from
        assert second.ferry.counters["restores"] == 1

    longer = prompt + tokens_of(300, seed=3)
    third = Runner(folder, cluster, tmp_path / "c")
    logits, hit = third.submit(longer)
    assert hit == PROMPT - 2
    np.testing.assert_allclose(logits, third.expected(longer), atol=2e-5)
    for runner in (first, second, third):
        runner.ferry.close()


def test_a_prompt_that_leaves_at_a_snapshot_goes_on_from_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    save_model("lfm2", tmp_path)
    prompt = tokens_of(PROMPT, seed=8)
    first = Runner(tmp_path, cluster, tmp_path / "a")
    first.submit(prompt)
    fork = prompt[:400] + tokens_of(100, seed=9)
    second = Runner(tmp_path, cluster, tmp_path / "b")
    logits, hit = second.submit(fork)
    assert hit == exo_contract.CHUNK  # where exo took its first snapshot
    np.testing.assert_allclose(logits, second.expected(fork), atol=2e-5)
    for runner in (first, second):
        runner.ferry.close()


def test_what_lies_behind_an_image_is_neither_stored_nor_restored(
    cluster: Cluster, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    prompt = tokens_of(PROMPT, seed=11)
    image = [SimpleNamespace(start_pos=300, end_pos=310, content_hash="aa")]
    first = Runner(tmp_path, cluster, tmp_path / "a")
    first.submit(prompt, image)
    second = Runner(tmp_path, cluster, tmp_path / "b")
    assert second.submit(prompt)[1] == 300  # text up to the image is text
    other = [SimpleNamespace(start_pos=300, end_pos=310, content_hash="bb")]
    third = Runner(tmp_path, cluster, tmp_path / "c")
    assert third.submit(prompt, other)[1] <= 300
    for runner in (first, second, third):
        runner.ferry.close()


def test_images_are_a_part_of_what_a_prompt_is_known_by(cluster: Cluster, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    prompt = [token % IMAGE_TOKEN for token in tokens_of(900, seed=12)]
    for start in (300, 560, 880):  # the last behind the last whole page
        prompt[start : start + 10] = [IMAGE_TOKEN] * 10
    eyes = tmp_path / "eyes"
    eyes.mkdir()
    (eyes / "config.json").write_text("{}")
    (eyes / "model.safetensors").write_bytes(b"weights")

    def asked(name: str, images: list[str]) -> int:
        runner = Runner(tmp_path, cluster, tmp_path / name, eyes)
        try:
            return runner.submit(prompt, runner.vision.process(images, prompt))[1]
        finally:
            runner.ferry.close()

    cat, dog = "8x8:cat", "8x8:dog"
    assert asked("a", [cat, dog, cat]) == 0
    assert asked("b", [cat, dog, cat]) == 898
    assert asked("c", [cat, dog, dog]) == 768
    assert asked("d", [cat, cat, cat]) == 512  # the page before the second image
    assert asked("e", [dog, cat, cat]) == 256
    assert asked("f", ["4x16:cat", dog, cat]) == 256  # the same pixels in other rows
    assert asked("g", [cat]) == 512  # what is no image is told by nothing
    (eyes / "model.safetensors").write_bytes(b"others")
    assert asked("h", [cat, dog, cat]) == 256  # seen with other eyes


def test_memory_pressure_stores_what_waits_before_exo_drops_it(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    cluster = Cluster(tmp_path, nodes=1)
    policy = named_policy("exact")
    del policy.when[:]
    policy.when.append(pb.TRIGGER_MEMORY_PRESSURE)
    policy.memory_mark = 0.999  # exo's own mark is what counts here
    cluster.policy_file.write_text(dump_policy(policy))
    with cluster:
        runner = Runner(tmp_path, cluster, tmp_path / "a")
        first, second = tokens_of(PROMPT, seed=21), tokens_of(PROMPT, seed=22)
        runner.submit(first)
        assert not runner.ferry.counters["blobs_put"]
        runner.engine.kv_prefix_cache.used = 0.99
        runner.submit(second)
        assert runner.ferry.counters["blobs_put"] > 0
        assert len(runner.engine.kv_prefix_cache.prompts) == 1  # exo dropped the first
        other = Runner(tmp_path, cluster, tmp_path / "b")
        assert other.submit(first)[1] == PROMPT - 2
        for each in (runner, other):
            each.ferry.close()


def test_nothing_is_touched_where_exo_has_changed() -> None:
    exo = modules()
    assert engine_problem(exo, exo, exo) == ""
    for name, replacement in (
        ("get_kv_cache", lambda self, model, tokens: None),
        ("add_kv_cache", lambda self, prompt_tokens, cache: None),
        ("_evict_if_needed", lambda self: None),
        ("clear", None),
    ):
        exo = modules()
        setattr(exo.KVPrefixCache, name, replacement)
        assert name in engine_problem(exo, exo, exo)
    supervisor = SimpleNamespace(entrypoint=lambda bound_instance: None, RunnerSupervisor=None)
    assert "entrypoint" in supervisor_problem(supervisor)
    before = supervisor.entrypoint
    assert take_hold(supervisor).startswith("exo has changed: entrypoint")
    assert supervisor.entrypoint is before
