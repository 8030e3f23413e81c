"""Models for the server: mlx-lm's own loading, plus ``smollm2``, plus float32 on a CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx import smollm2
from kvferry.codec.mlx.load import (
    LoadedModel,
    load_model,
    loaded_elsewhere,
    suit_device,
)
from kvferry.codec.mlx.tokenizer import GgufTokenizer
from kvferry.errors import ModelError
from kvferry.node.hooks.server.tokenizer import wrap_gguf


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A model as `ModelLoading.load` gave it away."""

    model: Any
    wrapper: Any
    config: Mapping[str, Any]
    own: LoadedModel | None = None
    whole: bool = True


@dataclass(slots=True)
class ModelLoading:
    """Takes the place of ``mlx_lm.utils.load`` in the server.

    Args:
        original: what it takes the place of.
        keep: what was given away, until `describe` asks for it.
    """

    original: Callable[..., Any]
    keep: bool = True
    _made: list[_Made] = field(default_factory=list)

    def load(
        self,
        path_or_hf_repo: str,
        tokenizer_config: Mapping[str, Any] | None = None,
        *args: Any,
        adapter_path: str | None = None,
        return_config: bool = False,
        **others: Any,
    ) -> tuple[Any, ...]:
        """Model, tokenizer and, if asked for, config; as the original.

        Raises: ModelError; and whatever the original raises.
        """
        if str(path_or_hf_repo) == smollm2.NAME:
            made = _load_smollm2(tokenizer_config or {}, adapter_path)
        else:
            others["lazy"] = True  # weights are cast before they are first made
            model, wrapper, config = self.original(
                path_or_hf_repo,
                tokenizer_config,
                *args,
                adapter_path=adapter_path,
                return_config=True,
                **others,
            )
            made = _Made(suit_device(model), wrapper, config)
            mx.eval(made.model.parameters())
        if self.keep:
            self._made.append(made)
        given = (made.model, made.wrapper)
        return (*given, made.config) if return_config else given

    def load_sharded(
        self,
        original: Callable[..., Any],
        repo: str,
        *args: Any,
        return_config: bool = False,
        **others: Any,
    ) -> tuple[Any, ...]:
        """Takes the place of ``mlx_lm.utils.sharded_load``: this rank's part of a model.

        Raises: ModelError; and whatever the original raises.
        """
        if str(repo) == smollm2.NAME:
            raise ModelError(f"{smollm2.NAME} cannot be split: give a folder or a hub id")
        model, wrapper, config = original(repo, *args, return_config=True, **others)
        made = _Made(suit_device(model), wrapper, config, whole=False)
        mx.eval(made.model.parameters())
        if self.keep:
            self._made.append(made)
        given = (made.model, made.wrapper)
        return (*given, made.config) if return_config else given

    def describe(self, model: Any, name: str, adapter_path: str | None = None) -> LoadedModel:
        """The model that `load` gave away, as hooks want it.

        Raises: ModelError: it did not come from here, or its files cannot be found.
        """
        made = next((m for m in self._made if m.model is model), None)
        if made is None:
            raise ModelError(f"{name} was not loaded by us")
        adapter = Path(adapter_path) if adapter_path else None
        if made.own is None:
            folder = _folder(name)
            return loaded_elsewhere(
                name, model, made.wrapper, made.config, folder, adapter, whole=made.whole
            )
        if adapter is None:
            return made.own
        files = loaded_elsewhere(name, model, made.wrapper, made.config, adapter, adapter)
        return replace(made.own, model=model, adapter_files=files.adapter_files)

    def forget(self) -> None:
        """Let go of every model."""
        self._made.clear()


def _load_smollm2(tokenizer_config: Mapping[str, Any], adapter_path: str | None) -> _Made:
    from mlx_lm.utils import load_adapters

    own = load_model(smollm2.NAME)
    assert isinstance(own.tokenizer, GgufTokenizer)  # noqa: S101 - what that name stands for
    model = own.model
    if adapter_path is not None:
        model = load_adapters(model, adapter_path)
        model.eval()
    wrapper = wrap_gguf(own.tokenizer, tokenizer_config.get("chat_template"))
    return _Made(model, wrapper, own.config, own)


def _folder(name: str) -> Path:
    """Where the files of a model lie that was just loaded. Raises: ModelError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as exc:
        raise ModelError(f"the files of {name} are not in the hub's cache folder") from exc
