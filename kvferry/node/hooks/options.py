"""How a hook behaves, where a user may want it otherwise."""

from dataclasses import dataclass, field
from pathlib import Path

from kvferry.node.pace import SHARE
from kvferry.node.patience import RESTART_S
from kvferry.places import user_dir
from kvferry.settings import GIB, NodeSettings


def _default_socket() -> Path:
    return NodeSettings.load().socket


@dataclass(frozen=True, slots=True, kw_only=True)
class HookOptions:
    """Options of `PrefixCache`. Times in seconds, sizes in tokens.

    Attributes:
        socket: Unix socket of this machine's node daemon.
        cache_dir: where calibrations and digests are kept.
        request_timeout_s: for one short question to the daemon.
        max_restore_s: no restore takes longer, whatever prefill would.
        keep_last: tokens at the end of a prompt that are never restored: the model
            must be given at least one to say what comes next (exo wants two).
        max_bytes_per_s: of blobs that cross a link, to spare it; 0: as fast as it goes.
        always_restore: also where prefill would be quicker, as it is with small models.
        link_retry_s: where the link is too slow for restores to pay, one blob is fetched
            so long after the last to see whether it got better; less and less often.
        busy_share: of the time that encoding takes while all cores are busy, with the
            model most likely; above 0, and 1 for no rests. Where a core is idle it has all
            of that one.
        restart_wait_s: so long an offer waits for a daemon that is not there; meanwhile a
            few more queue up, and further ones are dropped and counted.
        close_timeout_s: for offers still queued when the hook closes.
        gather_tokens: a model without a calibration gets one from so many tokens of
            live traffic; 0: never.
        gather_passes: backward passes for its weights, where `PrefixCache.idle` is called.
        gather_idle_s: without a request for so long, it may be fitted.
        gather_max_bytes: of memory for what is gathered; a model that needs more is
            left to ``kvferry calibrate``.
    """

    socket: Path = field(default_factory=_default_socket)
    cache_dir: Path = field(default_factory=lambda: user_dir("cache"))
    request_timeout_s: float = 5.0
    max_restore_s: float = 30.0
    keep_last: int = 1
    max_bytes_per_s: float = 0.0
    always_restore: bool = False
    link_retry_s: float = 10.0
    busy_share: float = SHARE
    restart_wait_s: float = RESTART_S
    close_timeout_s: float = 60.0
    gather_tokens: int = 8192
    gather_passes: int = 8
    gather_idle_s: float = 5.0
    gather_max_bytes: int = GIB
