"""From a model's curve to the choices that its layer groups have: what each takes and costs."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvferry.proto.v1 import coordinator_pb2 as pb

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Steps are those of one ladder for all models, nodes and times, so that codec ids, and with
# them copies of a page, stay few. One rung is 1.2 times the KL.
RUNGS_PER_OCTAVE = 8
FINER_OCTAVES = 2  # than what was measured: KL falls with the square of the step there
MAX_RUNGS = 512
AFFINE_BITS = 8.5  # per value, with scale and bias of each group of 64
# What 8-bit affine costs a whole model: 0.00003 nats on SmolLM2-135M, with a margin.
AFFINE_KL = 0.0001
EXACT_BITS = 16.0
_LEAST_KL = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec and its options, as a rule of a policy says them."""

    codec: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.codec} {told}".rstrip()


AFFINE = Choice("affine", (("bits", "8"),))
EXACT = Choice("zstd")


def ferry_step(rung: int) -> float:
    """Step of a rung, 0 being 1.0; as written into rules."""
    return float(f"{2.0 ** (rung / RUNGS_PER_OCTAVE):.6g}")


def ferry_choice(rung: int) -> Choice:
    """``ferry`` at a rung's step."""
    return Choice("ferry", (("step", f"{ferry_step(rung):.6g}"),))


@dataclass(frozen=True, eq=False)
class Ladder:
    """Choices of one model, from coarse to exact.

    Attributes:
        layers: of each group, absolute, half-open, in order.
        heads: KV heads of the model.
        widths: (groups,) values of a token.
        choices: what the columns of ``bits`` and ``kl`` are.
        bits: (groups, choices) bits of a token; ``ferry`` may take more than ``affine``.
        kl: (groups, choices) nats.
        count: so many of the columns may be chosen; one more, if there is one, is what
            holds where nothing is: one step for all groups, which need not be on the ladder.
    """

    layers: tuple[tuple[int, int], ...]
    heads: int
    widths: Floats
    choices: tuple[Choice, ...]
    bits: Floats
    kl: Floats
    count: int

    @cached_property
    def index(self) -> dict[Choice, int]:
        """Choice -> column, of those that may be chosen."""
        return {choice: at for at, choice in enumerate(self.choices[: self.count])}

    @property
    def alike(self) -> int:
        """The column of one step for all groups."""
        return len(self.choices) - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Curves:
    """What groups take and cost at any step.

    Attributes:
        octaves: (steps,) growing, log2 of the step.
        bits, kl: (groups, steps), bits not growing and KL not falling with the step.
    """

    octaves: Floats
    bits: Floats
    kl: Floats
    widths: Floats

    def at(self, octaves: Floats) -> tuple[Floats, Floats]:
        """(groups, octaves) bits and KL; beyond what was measured only towards finer."""
        finer = np.clip(self.octaves[0] - octaves, 0.0, None)
        bits = np.array([np.interp(octaves, self.octaves, row) for row in self.bits])
        logs = np.log2(np.maximum(self.kl, _LEAST_KL))
        kl = np.array([2.0 ** np.interp(octaves, self.octaves, row) for row in logs])
        return bits + self.widths[:, None] * finer, kl * 4.0**-finer

    def one_step(self, budget: float) -> Floats:
        """(1,) log2 of the coarsest step that all groups may have together."""
        low, high = self.octaves[0] - 24.0, self.octaves[-1]
        if float(self.at(np.array([high]))[1].sum()) <= budget:
            return np.array([high])
        for _ in range(40):
            middle = 0.5 * (low + high)
            if float(self.at(np.array([middle]))[1].sum()) <= budget:
                low = middle
            else:
                high = middle
        return np.array([low])


def make_ladder(curve: pb.ModelCurve, budget: float = 0.0) -> Ladder:
    """The choices of a model whose curve has been checked (`curves.check_curve`).

    Args:
        budget: in nats, of the one step for all that is beside them; 0: there is none.
    """
    widths = np.array([group.width for group in curve.groups], dtype=np.float64)
    known = _measured(curve, widths)
    low = math.ceil(RUNGS_PER_OCTAVE * (known.octaves[0] - FINER_OCTAVES))
    high = math.floor(RUNGS_PER_OCTAVE * known.octaves[-1])
    rungs = range(high, max(low, high - MAX_RUNGS) - 1, -1)
    bits, kl = known.at(np.log2([ferry_step(rung) for rung in rungs]))
    share = widths / widths.sum()
    choices = [*(ferry_choice(rung) for rung in rungs), AFFINE, EXACT]
    all_bits = [bits, AFFINE_BITS * widths[:, None], EXACT_BITS * widths[:, None]]
    all_kl = [kl, AFFINE_KL * share[:, None], np.zeros((len(widths), 1))]
    count = len(choices)
    if budget > 0:
        alike = known.at(known.one_step(budget))
        choices.append(Choice("ferry", (("target_kl", f"{budget:g}"),)))
        all_bits.append(alike[0])
        all_kl.append(alike[1])
    return Ladder(
        layers=tuple((group.layer_start, group.layer_end) for group in curve.groups),
        heads=curve.model_heads,
        widths=widths,
        choices=tuple(choices),
        bits=np.hstack(all_bits),
        kl=np.hstack(all_kl),
        count=count,
    )


def _measured(curve: pb.ModelCurve, widths: Floats) -> _Curves:
    order = np.argsort(np.array(curve.steps))
    steps = np.array(curve.steps)[order]
    bits = np.array([group.bits_per_token for group in curve.groups])[:, order]
    kl = np.array([group.kl for group in curve.groups])[:, order]
    if curve.measured_kl:
        measured = np.array(curve.measured_kl)[order]
        predicted = kl.sum(axis=0)
        share = widths / widths.sum()
        scaled = np.where(predicted > 0, measured / np.where(predicted > 0, predicted, 1.0), 0.0)
        kl = np.where(predicted > 0, kl * scaled, share[:, None] * measured)
    bits = np.minimum.accumulate(bits, axis=1)
    return _Curves(np.log2(steps), bits, np.maximum.accumulate(kl, axis=1), widths)
