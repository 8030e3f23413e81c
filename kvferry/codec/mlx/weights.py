"""The digests of a model's weights, config and tokenizer: what makes its `model_id`.

Bytes are read from the files' own ranges, not from the live arrays, so that a cast at
load changes nothing, and reading a file twice the machine's memory is no trouble.
"""

import json
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from kvferry.codec.mlx.gguf import TensorRange, read_gguf
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import reference_model
from kvferry.codec.mlx.rope import rope_specs
from kvferry.errors import ModelError
from kvferry.places import user_dir
from kvferry.proto.identity import ModelFingerprint, canonical_config
from kvferry.proto.keys import canonical_json

MAX_HEADER = 256 << 20
CHUNK = 8 << 20
_LAYER = re.compile(
    r"(?:(?:language_model|model|transformer|backbone)\.)*(?:layers|h|blocks)\.(\d+)\."
)
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.")
_EMBEDDING = re.compile(r"embe?d|wte|wpe")
_HEAD = re.compile(r"lm_head|^output\.")


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor, and the file that holds it."""

    file: Path
    tensor: TensorRange


def fingerprint(
    loaded: LoadedModel,
    layers: tuple[int, int] | None = None,
    *,
    cache_dir: Path | None = None,
) -> ModelFingerprint:
    """Digest what this machine holds. Reads files; meant for a background thread.

    Args:
        loaded: from `load_model`.
        layers: absolute, half-open: which layers' digests; those held if None.
        cache_dir: where digests are kept by path, size and time of change; the user's
            cache folder if None.
    Raises:
        ModelError: files of these layers are missing or damaged.
    """
    held = layers or loaded.layers
    reference = reference_model(loaded)
    specs = rope_specs(reference, ())
    groups = _digests(loaded, range(*held), cache_dir or user_dir("cache"))
    numbered = {int(name): digest for name, digest in groups.items() if name.isdigit()}
    missing = sorted(set(range(*held)) - set(numbered))
    if missing:
        raise ModelError(f"no weights of layers {missing} in the files of {loaded.name}")
    return ModelFingerprint(
        config=canonical_config(loaded.config),
        layers=numbered,
        layer_count=len(reference.layers),
        shared={name: digest for name, digest in groups.items() if not name.isdigit()},
        tokenizer=_tokenizer_digest(loaded.tokenizer_files),
        rope={layer: specs[layer].fingerprint() for layer in range(*held)},
        adapter=_adapter_digest(loaded.adapter_files),
    )


def _digests(loaded: LoadedModel, wanted: range, cache_dir: Path) -> dict[str, bytes]:
    """Group name -> digest; groups are layer numbers, "embedding", "norm" and "head"."""
    kept = _DigestCache(cache_dir / "digests", loaded.weight_files)
    known = kept.read()
    groups = {
        name: tensors
        for name, tensors in _groups(loaded.weight_files).items()
        if not name.isdigit() or int(name) in wanted
    }
    digests = {name: known[name] for name in groups if name in known}
    fresh = {name: _digest(groups[name]) for name in groups if name not in known}
    if fresh:
        kept.add(fresh)
    return digests | fresh


def _groups(files: Sequence[Path]) -> dict[str, list[_Placed]]:
    if not files:
        raise ModelError("the model has no weight files to be digested")
    groups: dict[str, list[_Placed]] = {}
    for file in files:
        tensors = read_gguf(file).tensors if file.suffix == ".gguf" else _safetensors(file)
        for tensor in tensors:
            groups.setdefault(_group_of(tensor.name), []).append(_Placed(file, tensor))
    complete = _index(files)
    for name in [n for n, held in groups.items() if len(held) < complete.get(n, 0)]:
        del groups[name]  # some of its files are on other machines only
    return groups


def _index(files: Sequence[Path]) -> dict[str, int]:
    """Group -> number of tensors that the whole model has, where an index says so."""
    index = files[0].parent / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        names = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"{index} is damaged: fetch the model anew") from exc
    counts: dict[str, int] = {}
    for name in names:
        counts[_group_of(name)] = counts.get(_group_of(name), 0) + 1
    return counts


def _group_of(name: str) -> str:
    if found := _GGUF_LAYER.match(name) or _LAYER.match(name):
        return found[1]
    if _HEAD.search(name):
        return "head"
    return "embedding" if _EMBEDDING.search(name) else "norm"


def _safetensors(file: Path) -> list[TensorRange]:
    """Tensor table of a safetensors file; sizes are checked, nothing is loaded."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise ModelError(f"{file} is no whole safetensors file: fetch the model anew")
        try:
            header = json.loads(stream.read(length))
            tensors = [
                TensorRange(
                    name, str(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"]
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError) as exc:
            raise ModelError(f"{file}: its header is damaged; fetch the model anew") from exc
    base = 8 + length
    placed = [TensorRange(t.name, t.dtype, t.shape, base + t.start, base + t.end) for t in tensors]
    if any(not base <= t.start <= t.end <= size for t in placed):
        raise ModelError(f"{file} is cut short: fetch the model anew")
    return placed


def _digest(tensors: Sequence[_Placed]) -> bytes:
    hasher = blake3()
    for placed in sorted(tensors, key=lambda p: p.tensor.name):
        tensor = placed.tensor
        about = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
        hasher.update(canonical_json(about))
        with placed.file.open("rb") as stream:
            stream.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                data = stream.read(min(CHUNK, left))
                if not data:
                    raise ModelError(f"{placed.file} ended early: fetch the model anew")
                hasher.update(data)
                left -= len(data)
    return hasher.digest()


def _tokenizer_digest(files: Sequence[Path]) -> bytes:
    if not files:
        raise ModelError("the model has no tokenizer file, so that its tokens cannot be keyed")
    hasher = blake3()
    for file in files:
        if file.suffix == ".gguf":
            metadata = read_gguf(file).metadata
            named = {k: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
            hasher.update(canonical_json(named))
        else:
            hasher.update(blake3(file.read_bytes()).digest())
    return hasher.digest()


def _adapter_digest(files: Sequence[Path]) -> bytes:
    """Of names and contents; empty where there is no adapter."""
    if not files:
        return b""
    hasher = blake3()
    for file in files:
        hasher.update(canonical_json(file.name))
        hasher.update(blake3(file.read_bytes()).digest())
    return hasher.digest()


class _DigestCache:
    """Digests of one set of files, kept until one of them changes."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        # Archives and rsync bring times of change along; nobody sets ctime.
        found = [(str(f.resolve()), f.stat()) for f in files]
        stats = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in found]
        self._path = folder / f"{blake3(canonical_json(stats)).hexdigest()[:32]}.json"

    def read(self) -> dict[str, bytes]:
        """What is known; a damaged or foreign file counts as nothing."""
        try:
            raw = json.loads(self._path.read_text())
            known = {str(name): bytes.fromhex(digest) for name, digest in raw.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
        return known if all(len(digest) == 32 for digest in known.values()) else {}

    def add(self, digests: Mapping[str, bytes]) -> None:
        """Keep more. Two ranks may do so at once: the later one's own are then computed anew."""
        merged = {name: value.hex() for name, value in (self.read() | dict(digests)).items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=".digests-", delete=False
            ) as file:
                json.dump(merged, file)
            Path(file.name).replace(self._path)
        except OSError:
            return  # a full or read-only cache folder only costs time
