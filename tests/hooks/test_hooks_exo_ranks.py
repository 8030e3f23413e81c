"""Several ranks in real exo: its own sharding, its own batch engine, collectives by its ring.

KVFERRY_EXO_PYTHON as in `test_hooks_exo_real`.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exo_group import PYTHON, Split, run_exo, save_v4_model
from model_zoo import save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.policy import named_policy
from kvferry.cluster.policy_file import dump_policy
from kvferry.proto.v1 import coordinator_pb2 as pb

NODES = 2
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not PYTHON, reason="KVFERRY_EXO_PYTHON names no Python with exo in it"),
]
PIPELINE = Split(((0, 2), (2, 4)))
TENSOR = Split(((0, 4), (0, 4)), tensor=True)
ALONE = Split(((0, 4),))
LENGTH = 600
# A sum over two ranks adds the same float32 numbers in another order than one matrix product.
OTHER_ORDER = 1e-5
IMAGE_TOKEN = 95


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


def model_in(folder: Path, name: str) -> Path:
    folder = folder / name
    folder.mkdir()
    save_model(name, folder)
    return folder


def prompt_of(seed: int, length: int = LENGTH) -> list[int]:
    """Without the token that stands for an image."""
    return [token % IMAGE_TOKEN for token in tokens_of(length, seed)]


def together(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of a group, on which its ranks must agree."""
    for answers in zip(*(rank["answers"] for rank in ranks), strict=True):
        assert len({answer["hit"] for answer in answers}) == 1
        assert len({tuple(answer["tokens"]) for answer in answers}) == 1
        for answer in answers[1:]:
            assert answer["logits"] == answers[0]["logits"]
    return list(ranks[0]["answers"])


def same(answer: dict[str, Any], wanted: dict[str, Any], exactly: bool) -> None:
    assert answer["tokens"] == wanted["tokens"]
    tolerance = 0.0 if exactly else OTHER_ORDER
    np.testing.assert_allclose(answer["logits"], wanted["logits"], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        # The first stores, the others restore.
        ("llama", [PIPELINE, PIPELINE, TENSOR, ALONE]),
        ("llama", [TENSOR, TENSOR, PIPELINE, ALONE]),
        ("glm4_moe_lite", [PIPELINE, PIPELINE, TENSOR, ALONE]),
        ("deepseek_v32", [TENSOR, TENSOR, PIPELINE]),
        ("gpt_oss", [PIPELINE, PIPELINE, ALONE]),
        ("qwen3_next", [PIPELINE, PIPELINE, ALONE]),
        ("qwen3_next", [TENSOR, TENSOR]),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_one_group_has_seen_another_restores_however_it_is_split(
    name: str, splits: list[Split], cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, name)
    # Another for each case: the first of them must find nothing.
    prompt = {"prompt": prompt_of(sum(map(ord, name)) + splits[0].tensor)}
    first = splits[0]
    unbroken = together(run_exo(first, folder, cluster, tmp_path / "first", [prompt]))[0]
    assert unbroken["hit"] == 0
    for number, split in enumerate(splits[1:]):
        found = together(run_exo(split, folder, cluster, tmp_path / str(number), [prompt]))[0]
        assert found["hit"] == LENGTH - 2
        same(found, unbroken, exactly=split.tensor == first.tensor)


@pytest.mark.parametrize("split", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
def test_whatever_fails_on_one_rank_all_of_them_do_the_same(
    split: Split, cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, "llama")
    seed = 100 + split.tensor * 10
    prompts = [prompt_of(seed + i) for i in range(5)]
    stored = [{"prompt": prompt} for prompt in prompts[:4]]
    unbroken = together(run_exo(split, folder, cluster, tmp_path / "first", stored))
    faults = ["lookup", "commit", "get", "offer"]
    broken = [
        {"prompt": prompt, "faults": {"1": fault}}
        for prompt, fault in zip(prompts, faults, strict=False)
    ]
    # One rank does not keep what exo itself would keep; asked again, all go without.
    broken += [{"prompt": prompts[4], "faults": {"1": "add"}}, {"prompt": prompts[4]}]
    ranks = run_exo(split, folder, cluster, tmp_path / "second", broken)
    answers = together(ranks)
    assert [answer["hit"] for answer in answers] == [0, 0, LENGTH - 2, LENGTH - 2, 0, 0]
    for answer, wanted in zip(answers, [*unbroken, answers[4]], strict=False):
        same(answer, wanted, exactly=True)
    same(answers[5], answers[4], exactly=True)
    assert ranks[0]["answers"][5]["entries"] == ranks[1]["answers"][5]["entries"] == 1
    # Those entries serve all ranks again.
    assert ranks[1]["counters"]["miss_bug"] == 2


@pytest.mark.parametrize("split", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
def test_a_prompt_is_restored_while_another_conversation_is_answered(
    split: Split, cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, "llama")
    prompts = [prompt_of(150 + split.tensor * 10 + i) for i in range(4)]
    stored = [{"prompt": prompt, "generate": 8} for prompt in prompts[:2]]
    unbroken = together(run_exo(split, folder, cluster, tmp_path / "first", stored))
    beside = [
        {**request, "beside": other} for request, other in zip(stored, prompts[2:], strict=True)
    ]
    answers = together(run_exo(split, folder, cluster, tmp_path / "second", beside))
    assert [answer["hit"] for answer in answers] == [LENGTH - 2, LENGTH - 2]
    for answer, wanted in zip(answers, unbroken, strict=True):
        same(answer, wanted, exactly=False)  # a batch of two is another matrix product


def test_where_one_machine_runs_plain_exo_all_run_as_without_us(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, "llama")
    requests = [{"prompt": prompt_of(200)}] * 2
    ranks = run_exo(PIPELINE, folder, cluster, tmp_path / "a", requests, faults={1: ["plain"]})
    answers = together(ranks)
    assert [rank["counters"] for rank in ranks] == [None, None]
    assert answers[0]["hit"] == 0
    assert answers[1]["hit"] > 0  # exo's own entry
    assert answers[1]["tokens"] == answers[0]["tokens"]


@pytest.mark.parametrize("split", [ALONE, PIPELINE], ids=["alone", "pipeline"])
def test_a_cache_class_that_we_do_not_know_runs_as_without_us_and_is_named(
    split: Split, cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, "llama")  # for its tokenizer
    save_v4_model(folder)
    requests = [{"prompt": prompt_of(200)}] * 2
    ranks = run_exo(split, folder, cluster, tmp_path / "a", requests)
    answers = together(ranks)
    assert [rank["counters"] for rank in ranks] == [None] * split.world
    assert answers[1]["tokens"] == answers[0]["tokens"]
    said = (tmp_path / "a" / "rank0.log").read_text().splitlines()
    about = [line for line in said if "prompts of this model are not stored" in line]
    assert len(about) == 1
    assert "DeepseekV4Cache" in about[0]


@pytest.mark.parametrize("split", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
def test_memory_pressure_on_one_rank_stores_and_drops_on_all(split: Split, tmp_path: Path) -> None:
    folder = model_in(tmp_path, "llama")
    cluster = Cluster(tmp_path, nodes=NODES)
    policy = named_policy("exact")
    del policy.when[:]
    policy.when.append(pb.TRIGGER_MEMORY_PRESSURE)
    policy.memory_mark = 0.999  # exo's own mark is what counts here
    cluster.policy_file.write_text(dump_policy(policy))
    prompts = [prompt_of(300 + i) for i in range(3)]
    requests: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    requests[2]["pressure"] = [0.1, 0.99]
    with cluster:
        ranks = run_exo(split, folder, cluster, tmp_path / "first", requests)
        unbroken = together(ranks)
        for rank in ranks:
            assert [answer["entries"] for answer in rank["answers"]] == [1, 2, 1]
            assert rank["counters"]["triggers"] == 1
        again = [{"prompt": prompt} for prompt in prompts]
        answers = together(run_exo(split, folder, cluster, tmp_path / "second", again))
    # What was dropped had been stored before; the third is still waiting for its trigger.
    assert [answer["hit"] for answer in answers] == [LENGTH - 2, LENGTH - 2, 0]
    for answer, wanted in zip(answers, unbroken, strict=True):
        same(answer, wanted, exactly=True)


def image(width: int, height: int, shade: int) -> str:
    """As a client sends it."""
    pixels = bytes((shade + i) % 256 for i in range(3 * width * height))
    return base64.b64encode(b"P6 %d %d 255\n" % (width, height) + pixels).decode()


@pytest.mark.parametrize("split", [ALONE, PIPELINE, TENSOR], ids=["alone", "pipeline", "tensor"])
def test_prompts_with_images_are_restored_whole_and_other_images_from_before_them(
    split: Split, cluster: Cluster, tmp_path: Path
) -> None:
    folder = model_in(tmp_path, "llama")
    length = 900
    prompt = prompt_of(400 + split.world + split.tensor, length)
    for start in (300, 560):
        prompt[start : start + 10] = [IMAGE_TOKEN] * 10
    cat, dog = image(4, 4, 3), image(4, 4, 90)
    shown = [[cat, dog], [cat, cat], [dog, dog], [image(2, 8, 3), dog], [dog, cat]]
    requests: list[dict[str, Any]] = [{"prompt": prompt, "images": images} for images in shown]
    first = [requests[0], *({**request, "uncached": True} for request in requests[1:])]
    wanted = together(run_exo(split, folder, cluster, tmp_path / "a", first, vision=True))
    assert {answer["hit"] for answer in wanted} == {0}
    assert wanted[1]["logits"] != wanted[0]["logits"]
    second = [{**request, "forget": True} for request in requests]
    found = together(run_exo(split, folder, cluster, tmp_path / "b", second, vision=True))
    # The last finds its first two pages where the third one left them.
    assert [answer["hit"] for answer in found] == [length - 2, 512, 256, 256, 512]
    same(found[0], wanted[0], exactly=True)
    for answer, plain in zip(found[1:], wanted[1:], strict=True):
        same(answer, plain, exactly=False)  # prefilled in other chunks
