"""Tiny random torch models, and what tests ask of them."""

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SALT = bytes(range(16))
VOCABULARY = 211


def tokenizer(words: int = 3) -> Tokenizer:
    """Of a few words: only its digest matters."""
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))  # noqa: S106


def tiny(seed: int = 3, **changes: Any) -> LlamaForCausalLM:
    """Three layers, two KV heads of 16, random but sharp enough to have opinions."""
    torch.set_num_threads(1)  # more are slower at this size
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_theta": 1000.0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
            layer.self_attn.v_proj.weight *= 12
        model.lm_head.weight *= 20
    return model


def prompt(count: int, seed: int = 5) -> list[int]:
    """Random token ids."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=made).tolist()


def prefilled(model: Any, tokens: list[int]) -> DynamicCache:
    """The cache after a prompt."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), past_key_values=DynamicCache()).past_key_values


def greedy(model: Any, tokens: list[int], cache: Any = None, count: int = 24) -> list[int]:
    """What the model goes on with."""
    asked = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            past_key_values=cache if cache is not None else DynamicCache(),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    found: list[int] = out[0, len(tokens) :].tolist()
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    kinds = {4: torch.int32, 2: torch.int16}
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
