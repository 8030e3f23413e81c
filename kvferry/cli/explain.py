"""``kvferry explain``: why a prompt is restored, or is not, and what that costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.node.client import NodeClient
    from kvferry.node.hooks.worth import Cost
    from kvferry.settings import NodeSettings

Ranges = Mapping[str, Sequence[tuple[int, int]]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The prompt: text, or JSON with token ids, messages or a request; -: stdin.",
        ),
    ],
    model: ModelOption = "smollm2",
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is what a user says to a chat model.")
    ] = False,
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="HOST:PORT[,...] of the coordinators, to name who has layers."),
    ] = None,
    prefill_rate: Annotated[
        float | None,
        typer.Option(metavar="TOKENS/S", help="Default: what hooks of this machine measured."),
    ] = None,
    link_rate: Annotated[
        float | None,
        typer.Option(metavar="MB/S", help="Default: what the node measured from the store."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Show page by page where a prompt's cache is, why a restore ends, and what it costs.

    Nothing is fetched and nothing is prefilled. Ask with the text as the model gets it: a
    chat server puts it into a template (--chat, or the request's JSON).
    """
    from kvferry.cli.explain_input import asked
    from kvferry.cli.explain_screen import as_json, print_explanation
    from kvferry.errors import ConfigError, NamespaceUnknownError, StoreUnavailableError
    from kvferry.node.client import NodeClient
    from kvferry.node.hooks.explain import explain as ask
    from kvferry.settings import NodeSettings

    for name, rate in (("prefill-rate", prefill_rate), ("link-rate", link_rate)):
        if rate is not None and not rate > 0:
            raise ConfigError(name, rate, "above 0")
    settings = NodeSettings.load(socket=socket, coordinator=coordinator)
    if not settings.socket.is_socket():
        reason = "no node daemon runs here; `kvferry node` or `kvferry up` starts one"
        raise StoreUnavailableError(str(settings.socket), reason)
    wanted = asked(model, prompt, chat=chat)
    with NodeClient(settings.socket, timeout_s=10.0) as client:
        hello = client.hello()
        if not hello.namespace_salt:
            raise NamespaceUnknownError(
                f"node {hello.node_id} has no namespace yet, so it neither restores nor stores: "
                "it gets one from the coordinator once that answers (`kvferry status`)"
            )
        found = ask(
            client,
            wanted.shard,
            hello.namespace_salt,
            hello.policy,
            wanted.tokens,
            _cost(client, prefill_rate, link_rate),
            holders=_holders(settings, wanted.shard.model_id),
            calibration_here=_calibration_here,
            layout=wanted.layout,
        )
    about = {
        "model": model,
        "model_id": wanted.shard.model_id.hex(),
        "node": hello.node_id,
        "policy": hello.policy.name,
        "accepts": list(hello.policy.accept),
    }
    if json:
        write_json(about | as_json(found), json)
    if json != "-":
        print_explanation(about, found)


def _cost(client: "NodeClient", prefill: float | None, link: float | None) -> "Cost":
    """What is known, in units per second; what a user says wins."""
    from kvferry.node.hooks.worth import Cost

    status = client.status()
    links = [at.bytes_per_s for at in status.links if at.bytes_per_s > 0]
    store = next((at.bytes_per_s for at in status.links if at.to == "store"), 0.0)
    measured = store or (min(links) if links else 0.0)
    return Cost(
        prefill=prefill or status.prefill_tokens_per_s or None,
        link=link * 1e6 if link else measured or None,
        near=None,
        decode=status.decode_tokens_per_s or None,
    )


def _holders(settings: "NodeSettings", model_id: bytes) -> Ranges:
    """Node -> layers of the model, as the coordinator heard; empty where it does not answer."""
    import asyncio

    from kvferry.cluster.coordinator_client import CoordinatorClient
    from kvferry.cluster.credentials import Credentials
    from kvferry.errors import FerryError

    address = settings.coordinator

    async def ask() -> Ranges:
        shown = Credentials.of(settings)
        async with CoordinatorClient(address, timeout_s=2.0, credentials=shown) as client:
            members = (await client.members()).members
        return {
            member.node_id: [
                (shard.layer_start, shard.layer_end)
                for shard in member.last.shards
                if shard.model_id == model_id
            ]
            for member in members
        }

    try:
        return asyncio.run(ask()) if address else {}
    except FerryError:
        return {}


def _calibration_here(calibration_id: bytes) -> bool:
    from kvferry.cli.blob_source import calibration_place

    return bool(calibration_place(calibration_id, ""))
