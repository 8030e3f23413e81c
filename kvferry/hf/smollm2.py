"""SmolLM2-135M-Instruct as a transformers model, from the same packaged GGUF file."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvferry.codec.mlx.gguf import read_gguf
from kvferry.codec.mlx.smollm2_file import config_of, gguf_path, placed
from kvferry.codec.mlx.tokenizer import GgufTokenizer
from kvferry.errors import ModelError
from kvferry.hf.gguf import float32_tensors


def load_smollm2(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LlamaForCausalLM, GgufTokenizer]:
    """The model in evaluation mode, and its tokenizer (``encode``, ``decode``,
    ``apply_chat_template``). Nothing is fetched from a hub.

    Its logits are those of ``kvferry.codec.mlx.load.load_model("smollm2")`` but for
    rounding: the weights are equal to the last bit in float32.

    Raises: ModelError: the package is not installed.
    """
    path = gguf_path()
    described = read_gguf(path)
    fields = config_of(described.metadata)
    config = LlamaConfig(**fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {}
    for name, values in float32_tensors(path, described.tensors):
        placed_name, rows = placed(name.removesuffix(".weight"), values, fields)
        weights[placed_name] = torch.from_numpy(rows.copy()).to(device, dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(
            f"{path.name} does not hold a llama of this transformers: "
            f"{[*missing, *unexpected][:3]} do not fit"
        )
    model.tie_weights()
    # Buffers that no file holds were made on the meta device, without values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval(), GgufTokenizer(described.metadata)
