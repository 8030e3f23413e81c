"""Models by name: ``smollm2``, a folder, or a hub id that mlx-lm takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from kvferry.codec.mlx import smollm2
from kvferry.codec.mlx.gguf import read_gguf
from kvferry.codec.mlx.tokenizer import GgufTokenizer, HubTokenizer, Tokenizer
from kvferry.errors import ModelError

_PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_LOAD_ERRORS = (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A live model with what belongs to it.

    Attributes:
        name: as asked for.
        model: an mlx-lm model.
        tokenizer: see `Tokenizer`.
        config: the model's config, as mlx-lm has it.
        weight_files: safetensors or GGUF files that the weights came from.
        tokenizer_files: files that make the tokenizer; the GGUF where it is in there.
        layers: absolute, half-open: whose weights are there.
        load_seconds: what loading took.
        adapter_files: of an adapter that is laid over the weights.
        whole: False: ``model`` has the layers of one rank only, or a part of each.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    tokenizer_files: tuple[Path, ...]
    layers: tuple[int, int]
    load_seconds: float = 0.0
    adapter_files: tuple[Path, ...] = ()
    whole: bool = True


def load_model(name_or_path: str, layers: tuple[int, int] | None = None) -> LoadedModel:
    """Load a model; on a CPU everything is float32, quantized matrices too.

    Args:
        name_or_path: ``smollm2``, a folder, or a hub id.
        layers: absolute, half-open: only these layers' weights (with embedding, norm
            and head) are made. The other layers stay in place without weights, so
            that running one fails at once.
    Raises:
        ModelError: one line with what is missing and how to get it.
    """
    started = time.monotonic()
    if name_or_path == smollm2.NAME:
        loaded = _load_smollm2(layers)
    else:
        loaded = _load_folder(name_or_path, layers)
    held = _held(loaded.config, loaded.model, layers)
    _empty_others(loaded.model, held)
    mx.eval(loaded.model.parameters())
    return LoadedModel(
        loaded.name,
        loaded.model,
        loaded.tokenizer,
        loaded.config,
        loaded.weight_files,
        loaded.tokenizer_files,
        held,
        time.monotonic() - started,
    )


def suit_device(model: Any) -> Any:
    """On a CPU: float32 throughout, quantized matrices too, as nothing else is fast there."""
    from mlx_lm.utils import dequantize_model

    if mx.default_device() != mx.Device(mx.cpu):
        return model
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def loaded_elsewhere(
    name: str,
    model: Any,
    wrapper: Any,
    config: Mapping[str, Any],
    folder: Path,
    adapter: Path | None = None,
    *,
    whole: bool = True,
) -> LoadedModel:
    """A model that mlx-lm's own functions have loaded.

    Args:
        wrapper: mlx-lm's ``TokenizerWrapper``.
        folder: of the files it came from.
        adapter: folder of the adapter that was laid over it.
        whole: see `LoadedModel`.
    Raises:
        ModelError: its config does not say how many layers it has.
    """
    return LoadedModel(
        name,
        model,
        HubTokenizer(wrapper),
        config,
        tuple(sorted(folder.glob("model*.safetensors"))),
        _tokenizer_files(folder),
        _held(config, model, None),
        adapter_files=tuple(sorted(p for p in adapter.glob("adapter*") if p.is_file()))
        if adapter
        else (),
        whole=whole,
    )


def load_tokenizer(name_or_path: str) -> tuple[Tokenizer, int]:
    """(tokenizer, layers of the model), without loading weights. Raises: ModelError."""
    if name_or_path == smollm2.NAME:
        metadata = read_gguf(smollm2.gguf_path()).metadata
        return GgufTokenizer(metadata), int(smollm2.config_of(metadata)["num_hidden_layers"])
    from mlx_lm.utils import load_config

    folder = _folder(name_or_path)
    return _hub_tokenizer(folder), _layer_count(load_config(folder), None)


def load_lazily(name_or_path: str) -> tuple[Any | None, Mapping[str, Any]]:
    """(model, config), to ask what a model is like: its weights are not read.

    Of a hub id nothing but the config is fetched. The model is None where weights are not
    on this machine. Element types are those that `load_model` would give.

    Raises: ModelError.
    """
    if name_or_path == smollm2.NAME:
        model, config, _, _ = smollm2.load()
        return model, config
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_model as load_mlx_model

    folder = _folder(name_or_path, ["*.json"])
    try:
        config = load_config(folder)
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
        if not any(folder.glob("model*.safetensors")):
            return None, config
        # A machine of a cluster may have the files of its own layers only.
        model, config = load_mlx_model(folder, lazy=True, strict=False)
    except _LOAD_ERRORS as exc:
        raise _not_loaded(name_or_path, exc) from exc
    return suit_device(model), config


def _not_loaded(name: str, exc: Exception) -> ModelError:
    first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    return ModelError(f"{name} cannot be loaded by mlx-lm: {first}")


def _load_smollm2(layers: tuple[int, int] | None) -> LoadedModel:
    model, config, described, path = smollm2.load(layers)
    tokenizer = GgufTokenizer(described.metadata)
    return LoadedModel(smollm2.NAME, model, tokenizer, config, (path,), (path,), (0, 0))


def _load_folder(name: str, layers: tuple[int, int] | None) -> LoadedModel:
    from mlx_lm.utils import load_model as load_mlx_model

    folder = _folder(name)
    try:
        model, config = load_mlx_model(folder, lazy=True, strict=layers is None)
    except _LOAD_ERRORS as exc:
        raise _not_loaded(name, exc) from exc
    model = suit_device(model)
    files = tuple(sorted(folder.glob("model*.safetensors")))
    return LoadedModel(
        name, model, _hub_tokenizer(folder), config, files, _tokenizer_files(folder), (0, 0)
    )


def _folder(name: str, patterns: Sequence[str] = _PATTERNS) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} has no config.json: give a model's folder or hub id")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"no model {name!r}: give smollm2, a folder, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(f"{name} cannot be fetched from the hub: {first}") from exc


def _hub_tokenizer(folder: Path) -> Tokenizer:
    from mlx_lm import utils

    load_wrapper: Any = utils.load_tokenizer
    try:
        return HubTokenizer(load_wrapper(folder))
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {exc}") from exc


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    for names in (["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]):
        found = tuple(folder / name for name in names if (folder / name).is_file())
        if found:
            return found
    return tuple(sorted(folder.glob("*.tiktoken")))


def _layer_count(config: Mapping[str, Any], model: Any) -> int:
    text = config.get("text_config") or {}
    for source in (config, text):
        for name in ("num_hidden_layers", "n_layers", "n_layer", "num_layers"):
            if isinstance(source.get(name), int):
                return int(source[name])
    if model is not None:
        return len(model.layers)
    raise ModelError("the model's config does not say how many layers it has")


def _held(config: Mapping[str, Any], model: Any, layers: tuple[int, int] | None) -> tuple[int, int]:
    count = _layer_count(config, model)
    if layers is None:
        return (0, count)
    if not 0 <= layers[0] < layers[1] <= count:
        raise ModelError(f"layers {layers[0]}-{layers[1]} are not in this model of {count} layers")
    return layers


def _empty_others(model: Any, held: tuple[int, int]) -> None:
    """Weights of layers that are not held become empty: using one is an error, not noise."""
    for index, layer in enumerate(model.layers):
        if held[0] <= index < held[1]:
            continue
        layer.update(tree_map(lambda _: mx.zeros((0,)), layer.parameters()))
