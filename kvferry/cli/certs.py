"""``kvferry certs``: a certificate authority of one's own, certificates and tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.cluster.authority import Authority
    from kvferry.cluster.tls import Expiry

CaOption = Annotated[
    Path | None,
    typer.Option("--ca", metavar="DIR", help="The authority. Default: `ca` beside kvferry.toml."),
]
NamespaceOption = Annotated[
    str, typer.Option(help="Whose caches; those of other namespaces are never found.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        no_args_is_help=True, help="Certificates and tokens, to leave loopback with."
    )
    for command in (init, issue, show, token, bind, revoke):
        group.command()(command)
    app.add_typer(group, name="certs")


def _folder(ca: Path | None) -> Path:
    from kvferry.places import user_dir

    return ca if ca is not None else user_dir("config") / "ca"


def _authority(ca: Path | None) -> "Authority":
    from kvferry.cluster.authority import Authority

    return Authority(_folder(ca))


def init(
    ca: CaOption = None,
    name: Annotated[str, typer.Option(help="What certificates call it.")] = "kvferry",
    json: JsonOption = None,
) -> None:
    """Make an authority for one cluster. Its key stays in its folder, on this machine."""
    from kvferry.cluster.authority import ADMIN_FILE, Authority

    made = Authority.create(_folder(ca), name)
    ends = made.expiry().ends
    admin = made.folder / ADMIN_FILE
    if json:
        found = {"ca": str(made.folder), "ends": f"{ends:%Y-%m-%d}", "admin_token": str(admin)}
        write_json(found, json)
        return
    typer.echo(f"made an authority in {made.folder}, which holds until {ends:%Y-%m-%d}; keep it")
    typer.echo("Next, for each machine: kvferry certs issue NAME --host ADDRESS")


def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The machine's name.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that others reach it under; repeat."),
    ] = None,
    namespace: NamespaceOption = "default",
    days: Annotated[float, typer.Option(help="How long the certificate holds.")] = 90.0,
    ca: CaOption = None,
    json: JsonOption = None,
) -> None:
    """Make a machine's folder: certificate, key and token. Again: renew its certificate."""
    from kvferry.cluster.tls import TlsFiles

    bundle = _authority(ca).issue(name, host or (), namespace=namespace, days=days)
    expiry = TlsFiles.of_folder(bundle).check()
    if json:
        write_json({"folder": str(bundle), **_expiry(expiry)}, json)
        return
    typer.echo(f"{bundle}: for {', '.join(expiry.hosts)}, until {expiry.ends:%Y-%m-%d}")
    typer.echo("Copy this folder to the machine (scp -rp), for kvferry's user only, and there:")
    typer.echo(f'  [security]\n  tls_dir = "/where/you/put/{name}"')


def show(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A machine's folder. Default: all.")
    ] = None,
    ca: CaOption = None,
    json: JsonOption = None,
) -> None:
    """Show which certificates hold until when, and which tokens there are."""
    from kvferry.cluster.tls import TlsFiles
    from kvferry.settings import NodeSettings

    own = folder or (None if ca or _folder(ca).is_dir() else NodeSettings.load().tls_dir)
    if own is not None:
        certificates = {own.name: TlsFiles.of_folder(own).check()}
        entries = []
    else:
        made = _authority(ca)
        certificates = {"(the authority)": made.expiry(), **dict(made.machines())}
        entries = [
            {
                "hash": entry.digest.hex()[:16],
                "namespace": entry.bearer.namespace,
                "right": entry.bearer.right.name.lower(),
                "label": entry.bearer.label,
                "issued": entry.issued,
                "writes_tag": f"{entry.bearer.tag:016x}" if entry.bearer.tag else "",
            }
            for entry in made.entries()
        ]
    if json:
        certs = [{"name": name, **_expiry(expiry)} for name, expiry in certificates.items()]
        write_json({"certificates": certs, "tokens": entries}, json)
        return
    _print(certificates, entries)


def token(
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE")],
    read_only: Annotated[bool, typer.Option("--read-only", help="It may restore only.")] = False,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may set policies, and scrub stores.")
    ] = False,
    label: Annotated[str, typer.Option(help="What `kvferry certs show` calls it.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it. Default: print it.")
    ] = None,
    ca: CaOption = None,
    json: JsonOption = None,
) -> None:
    """Make a token that may read and write caches of a namespace. It is shown only now.

    Servers keep its hash in tokens.json: copy that from the authority's folder (or from
    machines/NAME) to their tls_dir; they take it over within seconds.
    """
    from kvferry.cluster.durable import write_durably
    from kvferry.cluster.tokens import Right
    from kvferry.errors import ConfigError

    if read_only and admin:
        raise ConfigError("--read-only and --admin", "both", "one of the two")
    right = Right.READ if read_only else Right.ADMIN if admin else Right.WRITE
    made = _authority(ca)
    if out is not None and not out.parent.is_dir():
        raise ConfigError("--out", str(out), "a file in a folder that exists")
    text = made.token(namespace, right, label)
    if out is not None:
        write_durably(out, text.encode(), 0o600)
    if json:
        shown = {"out": str(out)} if out else {"token": text.strip()}
        write_json({"namespace": namespace, "right": right.name.lower(), **shown}, json)
        return
    typer.echo(f"wrote {out}" if out else text.strip())
    typer.echo(f"Copy {made.folder / 'tokens.json'} to the tls_dir of all servers.", err=True)


def bind(
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE")],
    tag: Annotated[
        str, typer.Option(metavar="TAG", help="As `kvferry quota show` has it; none: unbind.")
    ] = "",
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Knows the tag, if none is given.")
    ] = None,
    ca: CaOption = None,
    json: JsonOption = None,
) -> None:
    """Have tokens of a namespace store blobs of this namespace only.

    Until then servers believe a writer that says whose its blobs are, so that it can spend
    another's quota. Tokens that are made later are bound too; those of admins never are.
    """
    from kvferry.cli.quota import tag_of

    made = _authority(ca)
    value = 0 if tag == "none" else tag_of(tag or namespace, coordinator)
    count = made.bind(namespace, value)
    if json:
        write_json({"namespace": namespace, "tag": f"{value:016x}", "tokens": count}, json)
    if json != "-":
        done = f"bound to the tag {value:016x}" if value else "bound no more"
        typer.echo(f"{count} tokens of {namespace} are {done}")
        typer.echo(f"Copy {made.folder / 'tokens.json'} to the tls_dir of all servers.", err=True)


def revoke(
    digest: Annotated[
        str, typer.Argument(metavar="HASH", help="As `certs show` has it, 8 digits at least.")
    ],
    ca: CaOption = None,
    json: JsonOption = None,
) -> None:
    """Forget a token; servers refuse it once they have the new tokens.json."""
    from kvferry.errors import ConfigError

    made = _authority(ca)
    gone = made.revoke(digest)
    if not gone:
        raise ConfigError("HASH", digest, "the hash of a token (`kvferry certs show`)")
    if json:
        write_json({"revoked": gone}, json)
        return
    typer.echo(f"revoked {gone}; copy {made.folder / 'tokens.json'} to all servers")


def _expiry(expiry: "Expiry") -> dict[str, Any]:
    return {
        "hosts": list(expiry.hosts),
        "ends": f"{expiry.ends:%Y-%m-%dT%H:%M:%SZ}",
        "days_left": round(expiry.days_left, 1),
        "renew": expiry.soon,
    }


def _print(certificates: "dict[str, Expiry]", entries: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console()
    table = Table(title="certificates", title_justify="left")
    for name in ("machine", "for", "until", "days left"):
        table.add_column(name, overflow="fold")
    for name, expiry in certificates.items():
        left = f"{expiry.days_left:,.0f}" + (" (renew: kvferry certs issue)" if expiry.soon else "")
        table.add_row(name, ", ".join(expiry.hosts), f"{expiry.ends:%Y-%m-%d}", left)
    out.print(table)
    if entries:
        table = Table(title="tokens", title_justify="left")
        for name in entries[0]:
            table.add_column(name)
        for entry in entries:
            table.add_row(*entry.values())
        out.print(table)
