"""The real model, loaded once for all tests of this folder."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

from kvferry.codec.mlx.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A 4-bit llama of two layers as mlx-lm would save it, with a tokenizer of letters."""
    mx.random.seed(7)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "quantization": {"group_size": 32, "bits": 4},
        "transformers_version": "4.0",
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    letters = {"<unk>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    return tmp_path
