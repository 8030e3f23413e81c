"""A small model in a folder of its own, and a cluster of one node."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model

VOCABULARY = 64


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Three layers, two KV heads of 16, random but sharp enough to have opinions."""
    folder = tmp_path_factory.mktemp("tiny")
    mx.random.seed(3)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * 4
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * 4
    model.lm_head.weight = model.lm_head.weight * 6
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    letters = {"<unk>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return load_model(str(folder))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("high_compression")
    with cluster:
        yield cluster
