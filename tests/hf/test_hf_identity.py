"""`kvferry.hf.identity`: what makes another model of a model, and how it rotates."""

import logging
from dataclasses import replace
from typing import Any

import mlx_lm.models.llama as llama
import pytest
import torch
from hf_samples import tiny, tokenizer
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvferry.codec.base import DType
from kvferry.codec.mlx.rope import rope_specs
from kvferry.errors import ModelError
from kvferry.hf import identify
from kvferry.hf.identity import fingerprint
from kvferry.proto.identity import model_id

pytestmark = pytest.mark.hf


def test_the_same_content_is_the_same_model() -> None:
    first, again = identify(tiny(), tokenizer()), identify(tiny(), tokenizer())
    assert first == again
    assert (first.layers, first.heads, first.head_dim) == (3, 2, 16)
    assert first.dtype is DType.FLOAT32
    # transformers' own wrapper sets padding for each call: the same tokens all the same
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), unk_token="w0", pad_token="w0")  # noqa: S106
    before = identify(tiny(), wrapped).model_id
    wrapped(["a", "b c"], padding=True)
    assert identify(tiny(), wrapped).model_id == before


def test_whatever_changes_a_number_makes_another_model() -> None:
    known = {identify(tiny(), tokenizer()).model_id}
    touched = tiny()
    with torch.no_grad():
        touched.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    norm = tiny()
    with torch.no_grad():
        norm.model.norm.weight[0] += 1e-3
    for model, tokens in (
        (touched, tokenizer()),
        (norm, tokenizer()),
        (tiny().to(torch.bfloat16), tokenizer()),
        (tiny(rope_theta=1001.0), tokenizer()),
        (tiny(rms_norm_eps=1e-4), tokenizer()),
        (tiny(), tokenizer(words=4)),
        (tiny(), None),
    ):
        made = identify(model, tokens).model_id
        assert made not in known
        known.add(made)


def test_the_same_digests_from_mlx_would_be_another_model() -> None:
    groups = {"": bytes(32)} | {str(layer): bytes(32) for layer in range(3)}
    mine = fingerprint(tiny(), tokenizer(), groups, (), 3)
    plain = {name: value for name, value in mine.config.items() if name != "engine"}
    assert model_id(replace(mine, config=plain)) != model_id(mine)


def test_a_rotation_is_read_off_and_tried_out() -> None:

    model = tiny()
    found = identify(model, None).ropes
    assert len(found) == 3
    assert not found[0].traditional
    fields = model.config.to_dict() | {"rope_theta": 1000.0, "model_type": "llama"}
    fields = {k: v for k, v in fields.items() if k != "rope_parameters"}
    args = llama.ModelArgs.from_dict(fields)
    theirs = rope_specs(llama.Model(args))
    assert [r.fingerprint() for r in found] == [r.fingerprint() for r in theirs]


def test_rotations_that_pages_cannot_undo_are_left_unknown() -> None:
    dynamic = tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert identify(dynamic, None).ropes == ()
    pairs = CohereForCausalLM(
        CohereConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=30,
        )
    )
    found = identify(pairs, None).ropes
    assert found[0].traditional


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layer_of_a_llama_rotates_in_any_precision(dtype: torch.dtype) -> None:
    assert [spec.dims for spec in identify(tiny().to(dtype), None).ropes] == [16] * 3


def test_a_model_is_left_in_training_as_it_was() -> None:
    model = tiny(attention_dropout=0.5).train()
    model.lm_head.eval()
    assert len(identify(model, None).ropes) == 3
    assert model.training
    assert model.model.layers[1].self_attn.training
    assert not model.lm_head.training


def backwards(_module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cos, sin = given["position_embeddings"]
    return args, given | {"position_embeddings": (cos, -sin)}


def test_a_layer_that_rotates_by_itself_leaves_all_unknown_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny()
    wanted = identify(model, None).model_id
    model.model.layers[1].self_attn.register_forward_pre_hook(backwards, with_kwargs=True)
    with caplog.at_level(logging.INFO, "kvferry.hf"):
        found = identify(model, None)
    assert found.ropes == ()
    assert "layer 1 " in caplog.text
    assert found.model_id == wanted  # which exact caches are found by


def test_a_model_none_of_whose_layers_rotates_may_not_heed_positions() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Cohere2Config(
        **sizes, num_attention_heads=2, vocab_size=30, layer_types=["full_attention"] * 2
    )
    assert identify(Cohere2ForCausalLM(config), None).ropes == ()


def test_models_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny().config)
    with pytest.raises(ModelError, match="not in memory"):
        identify(model, None)
    with pytest.raises(ModelError, match="fast one"):
        identify(tiny(), object())
