"""From a bucket's address to obstore's S3, set up as `objects.Bucket` wants it."""

from typing import TYPE_CHECKING, Any

from kvferry.cluster.bucket.url import BucketUrl
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import S3Store


def s3_store(url: BucketUrl) -> "S3Store":
    """S3, with keys from the environment as obstore takes them.

    Raises: ConfigError: the extra is missing, or the bucket cannot be named so.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as exc:
        raise ConfigError(
            "backend", url.text, "used with obstore: pip install 'kvferry[s3]'"
        ) from exc
    config: dict[str, Any] = {"virtual_hosted_style_request": url.virtual_hosted}
    if url.endpoint:
        config["endpoint"] = url.endpoint
    if url.region:
        config["region"] = url.region
    try:
        return S3Store(
            url.bucket,
            config=config,  # type: ignore[arg-type]
            # Retries are ours, so that they are counted.
            retry_config={"max_retries": 0},
            client_options={
                "allow_http": url.plain,
                "connect_timeout": "2s",
                "timeout": "60s",
            },
        )
    except (BaseError, ValueError) as exc:
        line = str(exc).partition("\n")[0]
        raise ConfigError("backend", url.text, f"a bucket that can be used ({line})") from exc
