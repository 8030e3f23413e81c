"""Text to token ids and back: one small contract over a GGUF's and a hub's tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvferry.errors import ModelError

Message = Mapping[str, str]
_CONTROL = 3


class Tokenizer(Protocol):
    """What kvferry asks of a tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the model puts in front (bos) if anything."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""


class GgufTokenizer:
    """Byte-level BPE from GGUF metadata, digits split one by one ("smollm").

    Args:
        metadata: of a GGUF file, see `kvferry.codec.mlx.gguf`.
    Raises:
        ModelError: another kind of tokenizer.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ModelError(f"tokenizer {kind[0]}/{kind[1]} of this GGUF file is not known here")
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(line.split(" ", 1)) for line in metadata["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        kinds: list[int] = metadata["tokenizer.ggml.token_type"]
        bpe.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == _CONTROL
            ]
        )
        self.backend = bpe
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        self._front = [int(bos)] if bos is not None and _adds_bos(metadata) else []
        self._eos = frozenset({int(metadata["tokenizer.ggml.eos_token_id"])})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.chat_template: str = metadata.get("tokenizer.chat_template", "")
        self._template = environment.from_string(self.chat_template)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._eos

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens in it are recognised."""
        return self._front + list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        text = self._template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
        )
        return self.encode(text)


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_bos_token", False))


class HubTokenizer:
    """The same contract over mlx-lm's ``TokenizerWrapper``, kept as ``backend``."""

    def __init__(self, wrapper: Any) -> None:
        self.backend = wrapper

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset(int(token) for token in self.backend.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.backend.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        given = [dict(message) for message in messages]
        return list(
            self.backend.apply_chat_template(given, add_generation_prompt=add_generation_prompt)
        )
