"""kvferry: KV-cache offload for small clusters of machines that share one MLX model."""

__version__ = "0.1.0"

__all__ = ["__version__"]
