"""The real model, loaded once for all tests of this folder."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from tiny_llama import CONFIG, save_model

from kvferry.codec.mlx.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A 4-bit llama of two layers as mlx-lm would save it, with a tokenizer of letters."""
    mx.random.seed(7)
    config = CONFIG | {
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "quantization": {"group_size": 32, "bits": 4},
        "transformers_version": "4.0",
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    save_model(model, config, tmp_path)
    return tmp_path
