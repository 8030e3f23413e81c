"""The GGUF tokenizer in the clothes that mlx-lm's server expects."""

from typing import Any

from kvferry.codec.mlx.tokenizer import GgufTokenizer


def wrap_gguf(tokenizer: GgufTokenizer, chat_template: str | None = None) -> Any:
    """mlx-lm's ``TokenizerWrapper`` over the same vocabulary, merges and template.

    Args:
        chat_template: Jinja text in place of the model's own.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    ends = sorted(tokenizer.eos_token_ids)
    fast = make(
        tokenizer_object=tokenizer.backend,
        eos_token=tokenizer.backend.id_to_token(ends[0]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template or tokenizer.chat_template or None
    return TokenizerWrapper(fast, BPEStreamingDetokenizer, eos_token_ids=ends)
