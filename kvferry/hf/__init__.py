"""kvferry for transformers: caches of torch models, stored, restored and kept compressed.

`PrefixCache` keeps caches of prompts in a store or through a node daemon, `offload` and
`restore` are what it is made of, `CompressedCache` is a cache that ``model.generate`` takes
and that holds its history encoded. Everything is in the codecs and blobs of the rest of
kvferry. Needs the extra ``hf``; nothing else of kvferry imports this package.
"""

from kvferry.errors import ModelError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as exc:
    raise ModelError(
        f"kvferry.hf needs torch and transformers ({exc}): pip install 'kvferry[hf]'"
    ) from exc

from kvferry.hf.blobs import offload, restore
from kvferry.hf.calibrations import adopt, calibrate_lowrank
from kvferry.hf.compressed import CompressedCache
from kvferry.hf.identity import TorchModel, identify
from kvferry.hf.prefix_cache import PrefixCache
from kvferry.hf.smollm2 import load_smollm2
from kvferry.hf.tensors import fill, length, read

__all__ = [
    "CompressedCache",
    "PrefixCache",
    "TorchModel",
    "adopt",
    "calibrate_lowrank",
    "fill",
    "identify",
    "length",
    "load_smollm2",
    "offload",
    "read",
    "restore",
]
