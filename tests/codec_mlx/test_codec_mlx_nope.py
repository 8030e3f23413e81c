"""Attentions that do not say how they rotate: what they do to their keys says it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from model_zoo import model_of

from kvferry.codec.mlx.nope import Unrotated
from kvferry.codec.mlx.rope import NO_ROPE, page_ropes, rope_specs
from kvferry.errors import ModelError


@pytest.mark.parametrize(
    ("name", "layer", "attention", "unrotated"),
    [
        ("nemotron_h", 1, "mixer", True),
        ("llama", 0, "self_attn", False),
        ("gpt_oss", 1, "self_attn", False),
        ("deepseek_v3", 0, "self_attn", False),
    ],
)
def test_keys_of_equal_inputs_tell(name: str, layer: int, attention: str, unrotated: bool) -> None:
    model = model_of(name)
    asked = Unrotated(model)
    assert asked(getattr(model.layers[layer], attention)) == unrotated


def test_layers_that_rotate_nothing_need_no_module() -> None:
    model = model_of("nemotron_h")
    assert page_ropes(model, [1]) == [NO_ROPE]


class Wrapped(nn.Module):
    """An attention one step deeper, beside a method that only bears the name."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def attn(self) -> None:
        raise NotImplementedError


def test_an_attention_one_step_deeper_is_found() -> None:
    model = model_of("llama")
    specs = rope_specs(model)
    for layer in model.layers:
        layer.self_attn = Wrapped(layer.self_attn)
    assert rope_specs(model) == specs


class Hidden:
    """A rotation under another name."""

    def __init__(self, attention: Any) -> None:
        self._attention, self._turn = attention, attention.rope

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self._attention(x, mask=mask, cache=cache)


def test_a_rotation_under_another_name_is_refused() -> None:
    model = model_of("llama")
    for layer in model.layers:
        layer.self_attn = Hidden(layer.self_attn)
    with pytest.raises(ModelError, match="layer 0: no rope module"):
        rope_specs(model)
