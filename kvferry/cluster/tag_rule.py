"""Whose blobs a caller may put: those of its own namespace, once its tag is known.

A tag is made from a namespace's salt, which servers of blobs never see, so that the
operator binds it to a namespace's tokens (``kvferry certs bind``). Until then the word of
the writer is taken, and at all times that of a blob which names no namespace (tag 0).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvferry.errors import WrongNamespaceError


@dataclass(frozen=True, slots=True)
class TagRule:
    """What blobs of one writer may say.

    Attributes:
        namespace: the writer's.
        own: its tag; 0: not bound.
        others: tags that are bound to other namespaces, with their names.
    """

    namespace: str
    own: int = 0
    others: Mapping[int, str] = field(default_factory=dict)

    def check(self, tag: int) -> None:
        """Raises: WrongNamespaceError: it is another's."""
        if not tag or tag == self.own:
            return
        if self.own or tag in self.others:
            raise WrongNamespaceError(f"{tag:016x}", self.others.get(tag, ""), self.namespace)
