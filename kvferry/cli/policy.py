"""``kvferry policy``: what is in force, put another in force, ask why."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvferry.cli.output import JsonOption, write_json
from kvferry.cli.policy_simulate import simulate

if TYPE_CHECKING:
    from kvferry.cluster.coordinator_client import CoordinatorClient
    from kvferry.proto.v1 import coordinator_pb2 as pb

_T = TypeVar("_T")
UNDECIDED = (
    "The optimizer decides nothing here: no nodes that hold all of such a model have told its "
    "calibration's curve (`kvferry calibrate`)."
)

AddressOption = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="HOST:PORT[,...]", help=r"As in \[node] if left out."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="The policy that steers the nodes.")
    group.command()(show)
    group.command(name="set")(put)
    group.command()(explain)
    group.command()(simulate)
    app.add_typer(group, name="policy")


def _call(address: str | None, ask: "Callable[[CoordinatorClient], Awaitable[_T]]") -> _T:
    import asyncio

    from kvferry.cluster.coordinator_client import CoordinatorClient
    from kvferry.cluster.credentials import Credentials
    from kvferry.errors import ConfigError
    from kvferry.settings import NodeSettings

    settings = NodeSettings.load()
    where = address or settings.coordinator
    if not where:
        raise ConfigError("coordinator", where, "HOST:PORT of a coordinator (--coordinator)")

    async def run() -> _T:
        async with CoordinatorClient(where, credentials=Credentials.of(settings)) as client:
            return await ask(client)

    return asyncio.run(run())


def _as_json(policy: "pb.Policy") -> dict[str, object]:
    """In the words of policy files."""
    import tomllib

    from kvferry.cluster.policy import dump_policy

    return {"version": policy.version, **tomllib.loads(dump_policy(policy))}


def show(coordinator: AddressOption = None, json: JsonOption = None) -> None:
    """Print the policy in force, as the file that would bring it about."""
    from kvferry.cluster.policy import dump_policy

    reply = _call(coordinator, lambda client: client.explain(0))
    if json:
        found = {"source": reply.source, "problem": reply.problem, **_as_json(reply.policy)}
        write_json(found, json)
        return
    typer.echo(f"# version {reply.policy.version}, from: {reply.source}")
    if reply.problem:
        typer.echo(f"# the policy file is not in force: {reply.problem}")
    typer.echo(dump_policy(reply.policy), nl=False)


def put(
    policy: Annotated[str, typer.Argument(metavar="NAME_OR_FILE")],
    coordinator: AddressOption = None,
    json: JsonOption = None,
) -> None:
    """Put a policy in force: exact, default, high_compression, memory_emergency or a file."""
    from kvferry.cli.policy_warnings import policy_warnings
    from kvferry.cluster.policy import load_policy, named_policy, policy_names

    file = Path(policy)
    wanted = named_policy(policy) if policy in policy_names() else None
    if wanted is None:
        looks_like_file = file.suffix or file.exists() or file.parent != Path()
        wanted = load_policy(file) if looks_like_file else named_policy(policy)
    made = wanted
    version = _call(coordinator, lambda client: client.set_policy(made))
    warnings = policy_warnings(made)
    if json:
        write_json({"name": made.name, "version": version, "warnings": warnings}, json)
        return
    typer.echo(f"policy {made.name!r} is in force as version {version}")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def explain(
    coordinator: AddressOption = None,
    layers: Annotated[int, typer.Option(min=1, max=4096, help="Layers of the model.")] = 30,
    model: Annotated[str, typer.Option(help="Model id (64 hex digits).")] = "",
    node: Annotated[str, typer.Option(help="As this node codes them.")] = "",
    json: JsonOption = None,
) -> None:
    """Say for each layer how it is coded, and why.

    Where the optimizer decides, also for each node and layer group: its share of the
    budget, its bytes, which node is the slowest, and what the next finer and coarser
    choices would cost.
    """
    from kvferry.cli.policy_decisions import as_json, print_decisions
    from kvferry.errors import ConfigError

    try:
        model_id = bytes.fromhex(model)
    except ValueError as exc:
        raise ConfigError("model", model, "hex digits, two for each byte") from exc
    reply = _call(coordinator, lambda client: client.explain(layers, model_id, node))
    models = {decision.model_id for decision in reply.decisions}
    if node and not model and len(models) == 1:  # rules of the optimizer's are for one model
        (model_id,) = models
        reply = _call(coordinator, lambda client: client.explain(layers, model_id, node))
    if json:
        told = [{"layer": x.layer, "codec": x.codec, "why": x.why} for x in reply.layers]
        decisions = [as_json(decision) for decision in reply.decisions]
        write_json({"policy": _as_json(reply.policy), "layers": told, "decisions": decisions}, json)
        return
    _print_runs(reply)
    print_decisions(reply.decisions, node)
    if reply.policy.budget_nats and not reply.decisions:
        typer.echo(UNDECIDED)


def _print_runs(reply: "pb.ExplainReply") -> None:
    """Layers told the same are one line."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "codec", "why", box=None, pad_edge=False)
    start = 0
    for index, layer in enumerate(reply.layers):
        last = index + 1 == len(reply.layers)
        if last or reply.layers[index + 1].why != layer.why:
            span = f"{start}" if start == layer.layer else f"{start} to {layer.layer}"
            table.add_row(span, layer.codec, layer.why)
            start = layer.layer + 1
    Console().print(table)
