"""SmolLM2 under transformers: the model that mlx-lm runs, and a prompt of it stored."""

import gc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from kvferry.codec.mlx.load import load_model
from kvferry.codec.mlx.rope import rope_specs
from kvferry.hf import identify, load_smollm2

pytestmark = pytest.mark.hf

TEXT = "Photosynthesis is how plants turn light into sugar. In 1779 Jan Ingenhousz found that"


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[object, object]]:
    torch.set_num_threads(2)
    yield load_smollm2()
    gc.collect()


def test_weights_logits_and_rotation_are_those_of_mlx_lm(live: tuple[object, object]) -> None:
    model, tokenizer = live
    theirs = load_model("smollm2")
    ids = tokenizer.encode(TEXT)
    assert ids == theirs.tokenizer.encode(TEXT)
    state = model.state_dict()
    for name, weight in tree_flatten(theirs.model.parameters()):
        assert np.array_equal(state[name].numpy(), np.asarray(weight)), name
    with torch.no_grad():
        mine = model(torch.tensor([ids])).logits[0].numpy()
    wanted = np.asarray(theirs.model(mx.array([ids]))[0])
    np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-3)
    assert (mine.argmax(axis=-1) == wanted.argmax(axis=-1)).all()
    found = identify(model, tokenizer)
    specs = rope_specs(theirs.model)
    assert [r.fingerprint() for r in found.ropes] == [s.fingerprint() for s in specs]


def test_half_precision_answers_too() -> None:
    model, tokenizer = load_smollm2(torch.bfloat16)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, len(ids) :].tolist())
