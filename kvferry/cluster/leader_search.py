"""Which of several coordinators to ask next. Pure but for the place it remembers."""

import re

from kvferry.errors import ConfigError, NotLeaderError, StoreUnavailableError

MAX_ADDRESSES = 16

_ADDRESS = re.compile(r"[^\s:/]{1,255}:[0-9]{1,5}|\[[0-9a-fA-F:.%]{2,64}\]:[0-9]{1,5}")


def parse_addresses(text: str) -> tuple[str, ...]:
    """``host:port,host:port``, in the order to be tried. Raises: ConfigError: too many."""
    found = tuple(filter(None, (part.strip() for part in text.split(","))))
    if len(found) > MAX_ADDRESSES:
        raise ConfigError("coordinator", text, f"at most {MAX_ADDRESSES} addresses HOST:PORT")
    return found


class LeaderSearch:
    """Goes round the configured addresses, and follows those that name the leader.

    Attributes:
        term: the latest that any of them has spoken in; what is said in an older one is
            refused.
        closed: no further attempts.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses
        self._place = 0
        self._told = ""  # by a standby: a leader beyond the configured addresses
        self._named: set[str] = set()
        self.term = 0
        self.closed = False

    @property
    def several(self) -> bool:
        """Whether it is worth looking further after a failure."""
        return len(self._addresses) > 1

    @property
    def address(self) -> str:
        """Where to ask now. Raises: StoreUnavailableError where there is no address."""
        if not self._addresses:
            raise StoreUnavailableError("coordinator", "no address of it is known")
        return self._told or self._addresses[self._place]

    @property
    def round(self) -> int:
        """So many attempts see every address."""
        return len(self._addresses)

    def failed(self, address: str, error: StoreUnavailableError) -> None:
        """Nothing came from ``address``: on to the leader that it names, or to the next."""
        if address != self.address:
            return  # another call has moved on already
        if isinstance(error, NotLeaderError) and self._follow(address, error.leader):
            return
        if not self._told:
            self._place = (self._place + 1) % len(self._addresses)
        self._told = ""

    def _follow(self, address: str, leader: str) -> bool:
        if leader == address or self._told or not _ADDRESS.fullmatch(leader):
            return False
        if len(self._named) >= MAX_ADDRESSES and leader not in self._named:
            return False
        if leader in self._addresses:
            self._place = self._addresses.index(leader)
        else:
            self._named.add(leader)
            self._told = leader
        return True

    @property
    def again(self) -> bool:
        """Whether to ask again: elsewhere, or at a leader that was named."""
        return not self.closed and (self.several or bool(self._told))

    def heard(self, where: str, term: int) -> None:
        """Raises: NotLeaderError for a term older than one that was heard before."""
        if 0 < term < self.term:
            raise NotLeaderError(where)
        self.term = max(self.term, term)
