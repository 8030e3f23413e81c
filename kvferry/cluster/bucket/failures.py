"""What obstore raises, as our errors, with a reason to count it by."""

import re

from kvferry.errors import StoreTimeoutError, StoreUnavailableError

_STATUS = re.compile(r"status code: (\d{3})|\b(5\d\d) [A-Z]|<Code>(\w+)</Code>")
_BUSY = ("429", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "409")

# Where a machine of Amazon's gets its keys: asked when there are none in the environment.
_ROLE = "169.254.169.254"


def reason_of(exc: BaseException) -> str:
    """``500``, ``503``, ``timeout``, ``connection``, ``denied`` or ``other``."""
    text = str(exc)
    name = type(exc).__name__
    if isinstance(exc, TimeoutError):
        return "timeout"
    if name in ("PermissionDeniedError", "UnauthenticatedError") or _ROLE in text:
        return "denied"
    if found := _STATUS.search(text):
        return next(group for group in found.groups() if group)
    if "TimedOut" in text or "timed out" in text:
        return "timeout"
    if any(word in text for word in ("Connect", "connection", "dns", "Incomplete", "Body")):
        return "connection"
    return "other"


def worth_retrying(reason: str) -> bool:
    """Whether the same request may succeed a moment later."""
    return reason in ("timeout", "connection", *_BUSY) or (
        len(reason) == 3 and reason.startswith("5") and reason != "501"
    )


def unavailable(where: str, reason: str, exc: BaseException) -> StoreUnavailableError:
    """The error to raise when no retry is left: one line."""
    if reason == "timeout":
        return StoreTimeoutError(where, "no answer within the deadline")
    if reason == "denied":
        return StoreUnavailableError(
            where, "access denied: see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    line = " ".join(str(exc).partition("\n\n")[0].split())
    return StoreUnavailableError(where, f"{reason}: {line[:200]}")
