"""How a model's weights are stored, and what they are computed in."""

from collections import Counter
from math import prod
from typing import Any

from mlx.utils import tree_flatten

from kvferry.codec.mlx.gguf import read_gguf
from kvferry.codec.mlx.load import LoadedModel


def quantization(loaded: LoadedModel) -> dict[str, object]:
    """``stored``: as the config says, or the type of most of a GGUF's weights; ``computed``.

    Raises: ModelError: a GGUF that can no longer be read.
    """
    stored: object = loaded.config.get("quantization")
    files = [path for path in loaded.weight_files if path.suffix == ".gguf"]
    if stored is None and files:
        values = Counter[str]()
        for path in files:
            for tensor in read_gguf(path).tensors:
                values[tensor.dtype] += prod(tensor.shape)
        stored = values.most_common(1)[0][0] if values else None
    sizes = Counter[str]()
    leaves: Any = tree_flatten(loaded.model.parameters())
    for _, array in leaves:
        sizes[str(array.dtype).removeprefix("mlx.core.")] += array.size
    computed = sizes.most_common(1)[0][0] if sizes else None
    return {"stored": stored, "computed": computed}
