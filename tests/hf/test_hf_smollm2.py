"""SmolLM2 under transformers: the model that mlx-lm runs, and a prompt of it stored."""

import gc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import DynamicCache

from kvferry.codec.mlx.load import load_model
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.raw import RawCodec
from kvferry.hf import identify, load_smollm2, offload, restore

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


def test_a_prompt_in_half_precision_comes_back_bit_by_bit(live: tuple[object, object]) -> None:
    exact, tokenizer = live
    model, _ = load_smollm2(torch.bfloat16)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        found = model(ids, past_key_values=DynamicCache())
        same = found.logits.argmax(-1) == exact(ids).logits.argmax(-1)
    assert float(same.float().mean()) > 0.8
    known, cache = identify(model, tokenizer), found.past_key_values
    assert known.model_id != identify(exact, tokenizer).model_id
    back = restore(offload(cache, ids[0].tolist(), RawCodec(), known, salt=bytes(16)), known)
    for mine, theirs in zip(back.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
