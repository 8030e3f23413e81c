"""``s3://BUCKET/PREFIX?endpoint=...``: where a bucket is, and nothing secret."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from kvferry.errors import ConfigError
from kvferry.settings import is_loopback

_FORM = "s3://BUCKET[/PREFIX][?endpoint=https://HOST&region=NAME]"
_OPTIONS = ("endpoint", "region", "allow_http", "virtual_hosted", "conditional_put")


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketUrl:
    """A parsed URL.

    Attributes:
        endpoint: of an S3 that is not Amazon's; empty: Amazon's of the region.
        region: empty: as the environment says.
        plain: HTTP without TLS.
        virtual_hosted: the bucket's name stands in the host's, and so in ``endpoint``.
        conditional_put: the server knows ``If-None-Match: *``; only saves double work.
    """

    text: str
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    plain: bool = False
    virtual_hosted: bool = False
    conditional_put: bool = True


def parse_bucket_url(text: str) -> BucketUrl:
    """Raises: ConfigError: not of the form, or plain HTTP beyond loopback unasked for."""
    parts = urlsplit(text)
    if parts.scheme != "s3" or not parts.netloc or parts.fragment:
        raise ConfigError("backend", text, _FORM)
    if "@" in parts.netloc:
        shown = text.replace(parts.netloc.rpartition("@")[0], "...")
        raise ConfigError(
            "backend", shown, f"{_FORM}: keys go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ConfigError("backend", text, f"{_FORM}; no option {unknown[0]}, but {_OPTIONS}")
    prefix = unquote(parts.path).strip("/")
    if any(segment in ("", ".", "..") for segment in prefix.split("/") if prefix):
        raise ConfigError("backend", text, f"{_FORM} with a plain prefix")
    endpoint = options.get("endpoint", "").rstrip("/")
    plain = _plain(text, endpoint, _flag(text, options, "allow_http", False))
    return BucketUrl(
        text=text,
        bucket=parts.netloc,
        prefix=prefix,
        endpoint=endpoint,
        region=options.get("region", ""),
        plain=plain,
        virtual_hosted=_flag(text, options, "virtual_hosted", False),
        conditional_put=_flag(text, options, "conditional_put", True),
    )


def _flag(text: str, options: dict[str, str], name: str, default: bool) -> bool:
    value = options.get(name)
    if value is None:
        return default
    if value not in ("true", "false"):
        raise ConfigError("backend", text, f"{_FORM}; {name} is true or false")
    return value == "true"


def _plain(text: str, endpoint: str, allowed: bool) -> bool:
    """Whether to speak HTTP without TLS: on loopback, or where it was asked for."""
    if not endpoint:
        return False
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("backend", text, f"{_FORM}; an endpoint is https://HOST[:PORT]")
    if parts.scheme == "https":
        return False
    if not (allowed or is_loopback(f"{parts.hostname}:0")):
        raise ConfigError(
            "backend", text, "an https:// endpoint (or add &allow_http=true on a trusted network)"
        )
    return True
