"""What a kind of experiment is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.bench import Bench


class Kind(Protocol):
    """One kind of measurement; see the package's docstring. Frozen, without state."""

    name: ClassVar[str]
    """As ``kind = "..."`` in a TOML, and in results."""

    title: ClassVar[str]
    """The headline of its section in the report."""

    def runs(self, table: Table) -> Sequence[Run]:
        """Raises: ConfigError: the table asks for what cannot be."""

    def work(self, run: Run) -> float:
        """Tokens through the model, about."""

    def measure(self, run: Run, bench: "Bench", done: Done) -> Mapping[str, object]:
        """Run it.

        Args:
            done: called with numbers of tokens run.
        Returns: metrics, plain JSON values; NaN and infinity become null.
        Raises: FerryError.
        """

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """Markdown of what was found, without the headline.

        Args:
            results: of this kind, oldest first; never empty.
            folder: where PNG files go; the report lies in it too, so links are bare names.
        """


def each_codec(kind: str, table: Table, settings: Mapping[str, object]) -> list[Run]:
    """One run per length, text and codec of a table. Raises: ConfigError."""
    continuation = table.whole("continuation", 256)
    return [
        Run(
            kind=kind,
            codec=codec,
            text=text,
            context=context,
            continuation=continuation,
            settings=settings,
        )
        for context in table.wholes("contexts", (2048,))
        for text in table.texts("texts")
        for codec in table.codecs()
    ]
