"""All kinds of experiments by name."""

from collections.abc import Mapping

from kvferry.codec.lab.experiment.fidelity import Fidelity
from kvferry.codec.lab.experiment.kind import Kind

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (Fidelity(),)}
