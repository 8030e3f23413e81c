"""What one process holds of a model: layers, heads, and caches for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from kvferry.codec.mlx.adapters import CacheSnapshot, snapshot
from kvferry.codec.mlx.leaves import cache_form
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe, reference_model
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.mlx.shape import ModelShape, Span, TensorPart
from kvferry.codec.mlx.state_layout import state_layout
from kvferry.codec.rope import RopeSpec
from kvferry.codec.state_parts import StateLayout
from kvferry.errors import ModelError
from kvferry.node.coding import Shard


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One rank's part of a model.

    Attributes:
        loaded: the model; its config says what form of cache it is used with.
        shape: of the whole model.
        layers: absolute layers, half-open.
        span: page and state layers of this rank.
        tensor: heads and states of this rank.
        layout: how those states lie in the whole ones.
        make_cache: an empty cache of the local layers.
        form: of those caches where their numbers are not plain ones; "" else.
        specs: one rope spec for each page layer of the model.
    """

    loaded: LoadedModel
    shape: ModelShape
    layers: tuple[int, int]
    span: Span
    tensor: TensorPart
    layout: StateLayout
    make_cache: Callable[[], list[Any]]
    form: str
    specs: Sequence[RopeSpec]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        layers: tuple[int, int] | None = None,
        tensor: tuple[int, int] = (0, 1),
        make_cache: Callable[[], list[Any]] | None = None,
    ) -> Self:
        """See `kvferry.node.hooks.PrefixCache` for the arguments. Raises: ModelError."""
        reference = reference_model(loaded)
        shape = describe(reference, loaded.config)
        layers = layers or (0, shape.all_layers)
        make = make_cache or _prompt_cache_maker(loaded.model)
        span, part = shape.span(layers), shape.tensor_part(*tensor)
        layout = state_layout(loaded, shape, span.states, part.place)
        form = cache_form(make())
        if form:  # decides the numbers, and so belongs to the model's identity
            loaded = replace(loaded, config={**loaded.config, "kvferry_cache": form})
        return cls(
            loaded,
            shape,
            layers,
            span,
            part,
            layout,
            make,
            form,
            page_ropes(reference, shape.page_layers),
        )

    @property
    def rope(self) -> dict[int, bytes]:
        """Page layer of this rank -> what its rotation is known by."""
        return {layer: self.specs[layer].fingerprint() for layer in range(*self.span.pages)}

    def shard(self, model_id: bytes) -> Shard:
        """What blobs of this part say of it."""
        return Shard(
            model_id=model_id,
            model_layers=self.shape.layers,
            model_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            layers=self.span.pages,
            heads=self.tensor.heads,
            model_states=len(self.shape.states),
            states=self.span.states,
            state_part=self.tensor.place,
            writes_rows=self.tensor.writes_rows,
        )

    def snapshot(self, cache: Sequence[Any], tokens: int, *, packed: bool) -> CacheSnapshot:
        """The first ``tokens`` of a cache of this part.

        Raises: ModelError: the cache is not what the model was said to make.
        """
        made = snapshot(
            cache,
            tokens,
            self.span.pages[0],
            self.tensor.heads[0],
            latent=self.shape.latent,
            state_start=self.span.states[0],
            packed=packed,
            layout=self.layout,
        )
        if cache_form(cache) != self.form:
            # Its numbers are others than those of the caches that would be filled.
            raise ModelError(f"a cache of {cache_form(cache) or 'plain numbers'}: not stored")
        found, wanted = (made.layers, made.heads), (self.span.pages, self.tensor.heads)
        rows = made.layers[0] < made.layers[1]
        if found[0] != wanted[0] or (rows and found[1] != wanted[1]):
            raise ModelError(f"layers and heads {found} of a cache that should hold {wanted}")
        return made


def _prompt_cache_maker(model: Any) -> Callable[[], list[Any]]:
    from mlx_lm.models.cache import make_prompt_cache

    return lambda: list(make_prompt_cache(model))
