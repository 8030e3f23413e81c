"""What settings are read from beside flags: the TOML file, and a shared environment."""

from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource

from kvferry.errors import ConfigError
from kvferry.places import config_file

# Settings that all services and commands share.
SECURITY = ("tls_dir", "token_file", "tokens_file")


class TomlTable(TomlConfigSettingsSource):
    """One table of the TOML file, so that all services share a file."""

    def __init__(
        self, settings_cls: type[BaseSettings], table: str, only: tuple[str, ...] = ()
    ) -> None:
        """``only``: the keys that the table may have; none: any."""
        self._table, self._only = table, only
        path = config_file()
        if path is not None and not path.is_file():
            raise ConfigError("KVFERRY_CONFIG", str(path), "a file that exists")
        super().__init__(settings_cls, toml_file=path)

    def __call__(self) -> dict[str, Any]:
        value = self.toml_data.get(self._table, {})
        if not isinstance(value, dict):
            return {}
        for name in value if self._only else ():
            if name not in self._only:
                allowed = f"one of {', '.join(self._only)}"
                raise ConfigError(f"[{self._table}]", name, allowed)
        return value


class SecurityEnvironment(EnvSettingsSource):
    """``KVFERRY_SECURITY_TLS_DIR`` and the like, for all services at once."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, env_prefix="KVFERRY_SECURITY_")

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name in SECURITY}
