"""Every setting, validated, with its unit in its name.

Flags win over the environment (``KVFERRY_NODE_MEMORY_BYTES``), which wins over a TOML
file (``[node]`` in ``kvferry.toml`` of the working directory, else of the user's
configuration folder, or the file that ``KVFERRY_CONFIG`` names). What all services and
commands share stands in ``[security]`` (``KVFERRY_SECURITY_TLS_DIR``). Unknown keys are refused.
"""

import ipaddress
import os
import re
import uuid
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvferry.errors import ConfigError
from kvferry.places import user_dir
from kvferry.settings_sources import SECURITY, SecurityEnvironment, TomlTable

MIB = 1 << 20
GIB = 1 << 30


class ServiceSettings(BaseSettings):
    """Base of the services' settings: where they come from and in which order."""

    table: ClassVar[str]
    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True)

    allow_remote_plaintext: bool = Field(
        default=False, description="Bind beyond loopback although there is no TLS."
    )
    tls_dir: Path | None = Field(
        default=None, description="This machine's folder as `kvferry certs issue` made it."
    )
    token_file: Path | None = Field(
        default=None, description="Token to send; without it `token` in tls_dir, if it is there."
    )
    tokens_file: Path | None = Field(
        default=None,
        description="Tokens to take; without it `tokens.json` in tls_dir, if it is there.",
    )
    discovery: str = Field(
        default="",
        pattern=r"^[\w.-]{0,32}$",
        description="Cluster to announce, and look for, on the local network (mDNS); empty: off.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            SecurityEnvironment(settings_cls),
            TomlTable(settings_cls, cls.table),
            TomlTable(settings_cls, "security", SECURITY),
        )

    @classmethod
    def load(cls, **flags: object) -> Self:
        """Flags (None: not given) over environment over TOML. Raises: ConfigError."""
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)  # type: ignore[arg-type]
        except ValidationError as exc:
            first = exc.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or cls.table
            raise ConfigError(f"{cls.table}.{name}", first.get("input"), first["msg"]) from exc

    @field_validator("listen", check_fields=False)
    @classmethod
    def _has_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65_535:
            raise ValueError("HOST:PORT, with port 0 to take a free one")
        return value


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT names this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class EtcdSettings(ServiceSettings):
    """Base of the services that share etcd."""

    etcd: str = Field(
        default="", description="http://HOST:PORT[,...] of etcd's members, empty: none."
    )
    etcd_prefix: str = Field(default="/kvferry", description="Under which this cluster's keys are.")
    etcd_ca_file: Path | None = Field(default=None, description="PEM; for https endpoints.")
    etcd_cert_file: Path | None = Field(default=None, description="PEM; where etcd asks for one.")
    etcd_key_file: Path | None = Field(default=None, description="PEM, of etcd_cert_file.")
    etcd_user: str = Field(default="", description="Where etcd's authentication is enabled.")
    etcd_password_file: Path | None = Field(default=None, description="The user's password.")
    lease_ttl_s: float = Field(default=3.0, ge=2, le=600, description="Silent so long: replaced.")

    @field_validator("etcd_prefix")
    @classmethod
    def _is_path(cls, value: str) -> str:
        if not re.fullmatch(r"(/[A-Za-z0-9._-]{1,64}){1,8}", value):
            raise ValueError("a path such as /kvferry")
        return value


class NodeSettings(ServiceSettings):
    """``kvferry node``."""

    table: ClassVar[str] = "node"
    model_config = SettingsConfigDict(env_prefix="KVFERRY_NODE_")

    node_id: str = Field(
        default_factory=lambda: f"{os.uname().nodename}-{uuid.getnode() & 0xFFFF:04x}"
    )
    socket: Path = Field(
        default_factory=lambda: user_dir("runtime") / "node.sock",
        description="Unix socket for hooks on this machine.",
    )
    listen: str = Field(default="127.0.0.1:7801", description="HOST:PORT for peers.")
    metrics_listen: str = Field(default="127.0.0.1:7811", description="HOST:PORT, empty: none.")
    store: str = Field(default="127.0.0.1:7800", description="HOST:PORT of the store, empty: none.")
    coordinator: str = Field(
        default="127.0.0.1:7802",
        description="HOST:PORT[,HOST:PORT...] of the coordinators, empty: none.",
    )
    data_dir: Path = Field(default_factory=lambda: user_dir("state") / "node")
    memory_bytes: int = Field(default=256 * MIB, ge=0, description="Budget of the memory tier.")
    disk_bytes: int = Field(default=8 * GIB, ge=0, description="Budget of the disk tier, 0: none.")
    disk_reserve_bytes: int = Field(default=2 * GIB, ge=0, description="Free disk left alone.")
    upload_queue_bytes: int = Field(default=512 * MIB, gt=0)
    upload_workers: int = Field(default=2, ge=1, le=32)
    max_blob_bytes: int = Field(default=256 * MIB, gt=0)
    request_timeout_s: float = Field(default=30.0, gt=0)
    shutdown_timeout_s: float = Field(default=20.0, gt=0)
    peer_timeout_s: float = Field(default=0.5, gt=0)
    exo_url: str = Field(
        default="http://127.0.0.1:52415",
        pattern=r"^(https?://[^\s/]+/?)?$",
        description="exo's API on this machine, empty: not asked.",
    )
    probe_bytes_per_hour: int = Field(
        default=16 * MIB, ge=0, description="To measure links that no blob has crossed."
    )
    holdings_interval_s: float = Field(
        default=5.0, gt=0, description="Between two questions to a peer about what it holds."
    )
    fetch_inflight_bytes: int = Field(
        default=64 * MIB, gt=0, description="Under way from peers and store together."
    )
    serve_bytes_per_s: float = Field(
        default=0.0, ge=0, description="Sent to peers at most, 0: as fast as it goes."
    )
    handover_bytes: int = Field(
        default=512 * MIB, ge=0, description="Taken from peers that leave, in an hour."
    )
    copies: int = Field(
        default=1, ge=1, le=16, description="Nodes that hold what is read often; 1: no copies."
    )
    copy_bytes_per_hour: int = Field(
        default=256 * MIB, ge=0, description="Sent, and taken, for copies."
    )
    store_on_second_use: bool = Field(
        default=False, description="Store only what is offered for the second time."
    )
    disk_writes_per_day_bytes: int = Field(
        default=0,
        ge=0,
        description="Written to the disk tier in a day at most; the rest is kept in memory and "
        "the store only. 0: so much that the disk lasts ten years.",
    )
    disk_endurance_bytes: int = Field(
        default=0,
        ge=0,
        description="What the disk is rated to take in its life (TBW). 0: 300 times its size.",
    )

    @property
    def sought(self) -> frozenset[str]:
        """Of "store" and "coordinator", what is to be found on the network: no address given."""
        if not self.discovery:
            return frozenset()
        return frozenset({"store", "coordinator"} - self.model_fields_set)


class StoreSettings(EtcdSettings):
    """``kvferry store``."""

    table: ClassVar[str] = "store"
    model_config = SettingsConfigDict(env_prefix="KVFERRY_STORE_")

    listen: str = Field(default="127.0.0.1:7800", description="HOST:PORT.")
    metrics_listen: str = Field(default="127.0.0.1:7810", description="HOST:PORT, empty: none.")
    backend: str = Field(
        default_factory=lambda: f"file://{user_dir('state') / 'store'}",
        description="file:///PATH or s3://BUCKET/PREFIX?endpoint=URL",
    )
    budget_bytes: int = Field(default=64 * GIB, gt=0, description="Hard budget of the whole root.")
    reserve_bytes: int = Field(default=2 * GIB, ge=0, description="Free disk left alone.")
    max_blob_bytes: int = Field(default=256 * MIB, gt=0)
    staged_ttl_s: float = Field(default=600.0, gt=0, description="Staged and never committed.")
    shutdown_timeout_s: float = Field(default=20.0, gt=0)
    hot: str = Field(
        default="",
        description="redis://HOST:PORT or redis+cluster://HOST:PORT,..., read before the "
        "backend; empty: none.",
    )
    hot_bytes: int = Field(
        default=GIB, ge=0, description="Given to Redis as its memory limit; 0: it has its own."
    )
    hot_value_bytes: int = Field(
        default=64 * MIB, gt=0, le=512 * MIB, description="Larger blobs do not go there."
    )
    hot_ttl_s: int = Field(default=86_400, ge=0, description="Of a blob in Redis, 0: no end.")
    hot_fill: Literal["read", "put", "both"] = Field(
        default="read", description="What goes to Redis: what was read, put, or both."
    )
    hot_timeout_s: float = Field(default=2.0, gt=0, description="For Redis to answer.")
    scrub_bytes_per_s: int = Field(
        default=0, ge=0, description="All blobs are read and compared at this rate, 0: never."
    )
    replicas: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="HOST:PORT of nodes and stores that may have whole copies of what a scrub "
        "finds damaged.",
    )
    max_age_s: float = Field(
        default=0.0, ge=0, description="A bucket's pages not used for so long go; 0: none."
    )
    sweep_s: float = Field(default=60.0, gt=0, description="Between two sweeps of a bucket.")


class CoordinatorSettings(EtcdSettings):
    """``kvferry coordinator``."""

    table: ClassVar[str] = "coordinator"
    model_config = SettingsConfigDict(env_prefix="KVFERRY_COORDINATOR_")

    listen: str = Field(default="127.0.0.1:7802", description="HOST:PORT.")
    metrics_listen: str = Field(default="127.0.0.1:7812", description="HOST:PORT, empty: none.")
    policy_file: Path | None = Field(
        default=None, description="TOML policy; read again when it changes."
    )
    data_dir: Path = Field(default_factory=lambda: user_dir("state") / "coordinator")
    heartbeat_interval_s: float = Field(default=2.0, gt=0)
    away_after_s: float = Field(default=10.0, gt=0, description="No heartbeat: away.")
    advertise: str = Field(
        default="",
        description="HOST:PORT that nodes find this one at, where `listen` does not say it.",
    )
