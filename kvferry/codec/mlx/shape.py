"""The shape of a model's cache: layers, KV heads, and what streams it holds.

`kvferry.codec.mlx.probe` finds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.errors import ModelError

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class StreamShape:
    """One stream of each page layer: its KV heads, values per head, and whether it is rotated."""

    name: str
    heads: int
    dim: int
    rotated: bool


@dataclass(frozen=True, slots=True)
class StateShape:
    """One state layer.

    Attributes:
        entry: which entry of the model's cache it lies in.
        kind: the cache class.
        arrays: stream name -> shape after one token, without the batch.
        window: tokens that a ring keeps; 0: no ring.
    """

    entry: int
    kind: str
    arrays: Mapping[str, tuple[int, ...]]
    window: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """What a range of model layers holds: entries of the cache, page and state layers."""

    entries: Range
    pages: Range
    states: Range


@dataclass(frozen=True, slots=True)
class TensorPart:
    """What one of the ranks that share every layer holds of the rows.

    Attributes:
        place: rank, and how many share; (0, 1): nobody.
        heads: absolute, half-open.
        writes_rows: False where another rank holds the same heads and stores them.
    """

    place: tuple[int, int]
    heads: Range
    writes_rows: bool = True


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cache of the whole model looks like.

    Attributes:
        layers: page layers of the whole model, those that hold rows of tokens.
        kv_heads: of the whole model, as completeness of a page counts them.
        head_dim: values per layer and token, divided by ``kv_heads`` and two.
        streams: name -> shape, in the order that blobs list them.
        model_layers: layers of the model itself; equal to ``layers`` if 0.
        page_entries: entry of the model's cache for each page layer; all of them if empty.
        entry_layers: model layer of each entry; the same numbers if empty.
        states: state layers.
    """

    layers: int
    kv_heads: int
    head_dim: int
    streams: Mapping[str, StreamShape]
    model_layers: int = 0
    page_entries: Sequence[int] = ()
    entry_layers: Sequence[int] = ()
    states: Sequence[StateShape] = ()

    @property
    def latent(self) -> bool:
        """Whether rows are MLA's."""
        return "latent" in self.streams

    @property
    def all_layers(self) -> int:
        """Layers of the model itself."""
        return self.model_layers or self.layers

    @property
    def page_layers(self) -> Sequence[int]:
        """Model layer of each page layer."""
        entries = self.page_entries or range(self.layers)
        return [self._layer(entry) for entry in entries]

    @property
    def state_layers(self) -> Sequence[int]:
        """Model layer of each state layer; one that holds several is there as often."""
        return [self._layer(state.entry) for state in self.states]

    def _layer(self, entry: int) -> int:
        return self.entry_layers[entry] if self.entry_layers else entry

    def span(self, layers: Range) -> Span:
        """What ``layers`` of the model (half-open) hold."""
        count = len(self.entry_layers) or self.all_layers
        entries = [e for e in range(count) if layers[0] <= self._layer(e) < layers[1]]
        before = sum(self._layer(e) < layers[0] for e in range(count))
        pages, states = self.page_layers, self.state_layers
        return Span((before, before + len(entries)), _part(pages, layers), _part(states, layers))

    def tensor_part(self, rank: int = 0, size: int = 1) -> TensorPart:
        """KV heads are divided among ranks, in order; MLA's latents are on all of them.

        Raises: ModelError: heads that cannot be divided so.
        """
        if self.kv_heads == 1:
            return TensorPart((rank, size), (0, 1), writes_rows=rank == 0)
        if not 0 <= rank < size or self.kv_heads % size:
            raise ModelError(f"{self.kv_heads} KV heads cannot be divided among {size} ranks")
        each = self.kv_heads // size
        return TensorPart((rank, size), (rank * each, (rank + 1) * each))


def _part(places: Sequence[int], layers: Range) -> Range:
    """Which of ``places`` lie within ``layers``, as a range of their numbers."""
    start = sum(place < layers[0] for place in places)
    return start, start + sum(layers[0] <= place < layers[1] for place in places)
