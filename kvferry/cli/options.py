"""Options that several commands take, in one wording."""

from pathlib import Path
from typing import Annotated

import typer

# Commands that run a model and measure.
ModelOption = Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="What `kvferry calibrate` wrote. Default: user's cache."),
]
ContextOption = Annotated[int, typer.Option(help="Tokens that the codec codes.")]
ContinuationOption = Annotated[int, typer.Option(help="Tokens to measure on.")]

# Commands that serve; what is left out is in the settings.
ServeOption = Annotated[str | None, typer.Option(help="HOST:PORT to serve on.")]
SocketOption = Annotated[Path | None, typer.Option(help="Unix socket for hooks.")]
MetricsOption = Annotated[str | None, typer.Option(help="HOST:PORT for Prometheus, empty: none.")]
PolicyFileOption = Annotated[
    Path | None, typer.Option(help="TOML policy; read again when it changes.")
]
MaxBlobOption = Annotated[int | None, typer.Option(help="Largest blob taken.")]
ReserveOption = Annotated[int | None, typer.Option(help="Free disk left alone.")]
PlaintextOption = Annotated[
    bool | None, typer.Option(help="Bind beyond loopback although there is no TLS.")
]
TlsDirOption = Annotated[
    Path | None, typer.Option(help="This machine's folder from `kvferry certs issue`.")
]
DiscoveryOption = Annotated[
    str | None,
    typer.Option(metavar="CLUSTER", help="Find each other on the local network under this name."),
]
ReadyFileOption = Annotated[
    Path | None, typer.Option(help="JSON with the addresses, written when ready.")
]
LogLevelOption = Annotated[str, typer.Option(help="debug, info, warning or error.")]
