"""All kinds of experiments by name."""

from collections.abc import Mapping

from kvferry.codec.lab.experiment.cost import Cost
from kvferry.codec.lab.experiment.fidelity import Fidelity
from kvferry.codec.lab.experiment.instructions import Instructions
from kvferry.codec.lab.experiment.kind import Kind
from kvferry.codec.lab.experiment.merging import MergingLosses
from kvferry.codec.lab.experiment.needles import Needles
from kvferry.codec.lab.experiment.onoff import OnOff

_ALL: tuple[Kind, ...] = (Fidelity(), Needles(), Instructions(), OnOff(), Cost(), MergingLosses())
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}
