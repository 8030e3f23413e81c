"""Models as the server loads them are the models that everybody else loads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.weights import fingerprint
from kvferry.errors import ModelError
from kvferry.node.hooks.server.models import ModelLoading
from kvferry.proto.identity import model_id


def identity(loaded: LoadedModel, folder: Path) -> bytes:
    return model_id(fingerprint(loaded, cache_dir=folder))


@pytest.fixture
def adapter(tiny: LoadedModel, tmp_path: Path) -> Iterator[Path]:
    """A LoRA adapter of the small model, as mlx-lm's trainer leaves it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    about = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    model = load_model(tiny.name).model
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    save(model, folder)
    return folder


def save(model: Any, folder: Path) -> None:
    made = {name: mx.random.normal(w.shape) for name, w in leaves(model)}
    mx.save_safetensors(str(folder / "adapters.safetensors"), made)


def leaves(model: Any) -> list[tuple[str, Any]]:
    return list(tree_flatten(model.trainable_parameters()))


def test_a_folder_has_the_identity_that_load_model_gives_it(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    loading = ModelLoading(load)
    model, wrapper, config = loading.load(
        tiny.name, {"trust_remote_code": None}, adapter_path=None, return_config=True
    )
    assert config["model_type"] == "llama"
    assert wrapper.encode("abc") == tiny.tokenizer.encode("abc")
    loaded = loading.describe(model, tiny.name, None)
    assert identity(loaded, tmp_path) == identity(tiny, tmp_path)
    loading.forget()
    with pytest.raises(ModelError, match="not loaded by us"):
        loading.describe(model, tiny.name, None)


def test_quantized_matrices_become_float32_on_a_cpu(tiny: LoadedModel, tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model, save_config

    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("only a CPU needs it")
    folder = tmp_path / "quantized"
    folder.mkdir()
    fresh = load_model(tiny.name)
    model, config = quantize_model(fresh.model, dict(fresh.config), group_size=32, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(tiny.name) / name).read_bytes())
    loading = ModelLoading(load)
    model, _ = loading.load(str(folder))
    kinds = {value.dtype for _, value in tree_flatten(model.parameters())}
    assert kinds == {mx.float32}
    loaded = loading.describe(model, str(folder), None)
    assert identity(loaded, tmp_path) == identity(load_model(str(folder)), tmp_path)


def test_an_adapter_is_part_of_the_identity(
    tiny: LoadedModel, adapter: Path, tmp_path: Path
) -> None:
    loading = ModelLoading(load)
    model, _ = loading.load(tiny.name, adapter_path=str(adapter))
    first = loading.describe(model, tiny.name, str(adapter))
    assert describe(model, first.config) == describe(tiny.model, tiny.config)
    plain, one = identity(tiny, tmp_path), identity(first, tmp_path)
    assert plain != one
    fresh = load_model(tiny.name).model
    fresh.freeze()
    linear_to_lora_layers(fresh, 2, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    save(fresh, adapter)
    model, _ = loading.load(tiny.name, adapter_path=str(adapter))
    assert identity(loading.describe(model, tiny.name, str(adapter)), tmp_path) not in (plain, one)


@pytest.mark.model
def test_smollm2_comes_with_a_tokenizer_that_a_server_can_use() -> None:
    loading = ModelLoading(load)
    own = "{{ messages[0]['content'] }}!"
    model, wrapper, _ = loading.load("smollm2", {"chat_template": own}, return_config=True)
    text = wrapper.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "Hi!"
    assert wrapper.eos_token_ids == {2}
    assert loading.describe(model, "smollm2", None).name == "smollm2"
