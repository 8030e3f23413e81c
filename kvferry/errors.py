"""Every error that kvferry raises on purpose.

    FerryError
    ├── ConfigError                a setting that cannot hold
    │   └── OutOfReachError        a figure that no setting of a codec comes to
    ├── InvalidKeyError            a key that is not of the documented form
    ├── CodecError
    │   ├── CorruptBlobError       bytes that are not what their checksums say
    │   │   └── BlobTooLargeError  sizes beyond the caps
    │   ├── UnsupportedVersionError  a newer or unknown format version
    │   ├── UnknownCodecError      a codec name that is not in the registry
    │   ├── CalibrationMissingError  the blob's calibration is not to be had
    │   ├── CalibrationCorruptError  a calibration that does not match its id
    │   ├── IdentityMismatchError  another model, rope, page or layer range
    │   └── UnsupportedTensorError  input that a codec refuses (NaN, shape, dtype)
    ├── StoreError
    │   ├── BlobNotFoundError
    │   ├── StoreUnavailableError  down, unreachable, or answering nonsense
    │   │   ├── StoreTimeoutError
    │   │   ├── TokenRefusedError  a server does not know this caller's token
    │   │   └── NotLeaderError     a coordinator that stands by: ask the leader
    │   ├── NotAllowedError        a token without the right that a call needs
    │   │   └── WrongNamespaceError  a blob that claims to be another namespace's
    │   ├── StoreFullError         the byte budget or the disk reserve is reached
    │   └── QueueFullError         bounded queue: the offer is dropped
    ├── ModelError                 a model that cannot be loaded, keyed or hooked
    ├── FencedError                a later incarnation of this node has registered
    └── ProtocolError              a peer that does not follow the wire contract

Each carries its data as attributes, survives pickling (positional arguments), and
has a ``reason``: the short token under which misses and drops are counted.
"""

from typing import ClassVar


class FerryError(Exception):
    """Base of all. Hooks catch this one and count a miss under ``reason``."""

    reason: ClassVar[str] = "error"


class ConfigError(FerryError):
    """A setting that cannot hold: its name, its value and what is allowed."""

    reason = "config"

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(name, value, allowed)
        self.name, self.value, self.allowed = name, value, allowed

    def __str__(self) -> str:
        return f"{self.name} = {self.value!r} cannot be used: it must be {self.allowed}"


class OutOfReachError(ConfigError):
    """A compression ratio that a codec cannot be turned to; ``allowed`` has the nearest."""

    reason = "out_of_reach"


class InvalidKeyError(FerryError):
    """A key that is not of the documented form."""

    reason = "invalid_key"

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem

    def __str__(self) -> str:
        return f"{self.key!r} is no blob key: {self.problem}"


class CodecError(FerryError):
    """Base of what can go wrong between tensors and bytes."""

    reason = "codec"


class CorruptBlobError(CodecError):
    """Bytes that are not what they claim. Set the blob aside and count a miss."""

    reason = "corrupt"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"damaged blob, {self.field}: {self.problem}"


class BlobTooLargeError(CorruptBlobError):
    """A size beyond the caps; nothing was allocated for it."""

    reason = "too_large"

    def __init__(self, field: str, size: int, cap: int) -> None:
        super().__init__(field, f"{size:,} exceeds the cap of {cap:,}")
        self.args = (field, size, cap)
        self.size, self.cap = size, cap


class UnsupportedVersionError(CodecError):
    """A format version that this release does not read."""

    reason = "version"

    def __init__(self, what: str, found: int, known: int) -> None:
        super().__init__(what, found, known)
        self.what, self.found, self.known = what, found, known

    def __str__(self) -> str:
        return (
            f"{self.what} version {self.found} is not known here (this release reads "
            f"up to {self.known}): upgrade kvferry on this machine"
        )


class UnknownCodecError(CodecError):
    """A codec name that the registry does not have."""

    reason = "unknown_codec"

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        return f"no codec {self.name!r}: known are {', '.join(self.known)}"


class CalibrationMissingError(CodecError):
    """The calibration that a blob was written with is not here and not in the store."""

    reason = "calibration_missing"

    def __init__(self, calibration_id: str) -> None:
        super().__init__(calibration_id)
        self.calibration_id = calibration_id

    def __str__(self) -> str:
        return (
            f"calibration {self.calibration_id[:16] or '(none)'} is not to be had: fetch it "
            "from the store that the blob came from, or run `kvferry calibrate`"
        )


class CalibrationCorruptError(CodecError):
    """A calibration whose content does not hash to its id, or does not fit together."""

    reason = "calibration_corrupt"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"calibration {self.where} cannot be used: {self.problem}"


class IdentityMismatchError(CodecError):
    """A blob of another model, page, layer range or rope than the reader's."""

    reason = "identity"

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(field, found, wanted)
        self.field, self.found, self.wanted = field, found, wanted

    def __str__(self) -> str:
        return f"blob is for {self.field} {self.found}, wanted {self.wanted}"


class UnsupportedTensorError(CodecError):
    """Input that a codec refuses rather than store wrongly."""

    reason = "unsupported_tensor"

    def __init__(self, stream: str, problem: str) -> None:
        super().__init__(stream, problem)
        self.stream, self.problem = stream, problem

    def __str__(self) -> str:
        return f"stream {self.stream!r}: {self.problem}"


class StoreError(FerryError):
    """Base of what can go wrong between a caller and a store."""

    reason = "store"


class BlobNotFoundError(StoreError):
    """No such blob (any more)."""

    reason = "not_found"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"no blob {self.key}"


class StoreUnavailableError(StoreError):
    """Down, unreachable, or failing. Caller: a miss now, try again later."""

    reason = "unavailable"

    def __init__(self, where: str, problem: str = "") -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        tail = f": {self.problem}" if self.problem else ""
        return f"{self.where} cannot be reached{tail}"


class StoreTimeoutError(StoreUnavailableError):
    """No answer within the deadline."""

    reason = "timeout"


class TokenRefusedError(StoreUnavailableError):
    """No token, or one that the server does not know. Caller: a miss now, try again later."""

    reason = "token_refused"

    def __str__(self) -> str:
        return f"{self.where} refuses this caller's token: {self.problem}"


class NotAllowedError(StoreError):
    """The token is known, and has no right to this call. Caller: do not try again."""

    reason = "not_allowed"

    def __init__(self, what: str, needed: str, held: str) -> None:
        super().__init__(what, needed, held)
        self.what, self.needed, self.held = what, needed, held

    def __str__(self) -> str:
        return (
            f"{self.what} needs the right to {self.needed}, this caller's token has {self.held}: "
            "use another token (token_file), or issue one with `kvferry certs token`"
        )


class WrongNamespaceError(NotAllowedError):
    """A blob with the tag of a namespace that the writer's token is not for.

    ``namespace``: the tag's; empty: of none that is bound. ``writer``: the token's.
    """

    reason = "wrong_namespace"

    def __init__(self, tag: str, namespace: str, writer: str) -> None:
        super().__init__("Put", f"write in {namespace or 'another namespace'}", writer)
        self.args = (tag, namespace, writer)
        self.tag, self.namespace, self.writer = tag, namespace, writer

    def __str__(self) -> str:
        whose = f"namespace {self.namespace}" if self.namespace else "another namespace"
        return (
            f"a blob with the tag of {whose} ({self.tag}), and this caller's token writes in "
            f"{self.writer} only: use a token of the blob's namespace, or, where the secret of "
            f"{self.writer} is a new one, bind it again (`kvferry certs bind {self.writer}`)"
        )


class NotLeaderError(StoreUnavailableError):
    """A coordinator that stands by. Caller: ask ``leader``, or the others where it is empty."""

    reason = "not_leader"

    def __init__(self, where: str, leader: str = "") -> None:
        super().__init__(where)
        self.args = (where, leader)
        self.leader = leader

    def __str__(self) -> str:
        if self.leader:
            return f"{self.where} is not the leader: ask the one at {self.leader}"
        return (
            f"{self.where} is not the leader, and none is known: try again in some seconds, "
            "and see to etcd if that does not help"
        )


class StoreFullError(StoreError):
    """The byte budget or the free-space reserve is reached and nothing may be evicted."""

    reason = "full"

    def __init__(self, where: str, need: int, free: int) -> None:
        super().__init__(where, need, free)
        self.where, self.need, self.free = where, need, free

    def __str__(self) -> str:
        return (
            f"{self.where} is full: {self.need:,} bytes wanted, {self.free:,} free within "
            "its budget and disk reserve; raise the budget or prune"
        )


class QueueFullError(StoreError):
    """A bounded queue is full: the offer is dropped and counted."""

    reason = "queue_full"

    def __init__(self, queue: str, limit: int) -> None:
        super().__init__(queue, limit)
        self.queue, self.limit = queue, limit

    def __str__(self) -> str:
        return f"queue {self.queue} is full ({self.limit:,}): offer dropped"


class ModelError(FerryError):
    """A model that cannot be loaded, keyed or hooked: what, and what to do."""

    reason = "model"


class IdentityPendingError(ModelError):
    """The model's digest is not known yet: it neither hits nor stores until then."""

    reason = "identity_pending"


class NamespaceUnknownError(ModelError):
    """No namespace salt has come from the coordinator yet: keys cannot be made."""

    reason = "no_namespace"


class FencedError(FerryError):
    """A later start of the same node id has registered: this one must not speak for it."""

    reason = "fenced"


class ProtocolError(FerryError):
    """The other side does not follow the wire contract."""

    reason = "protocol"
