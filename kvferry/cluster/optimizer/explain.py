"""Why parts are coded as they are: shares of the budget, the slowest node, the next choices."""

import numpy as np

from kvferry.cluster.optimizer.decide import GAIN, LEAST_GAIN_S, Judged, Outlook
from kvferry.cluster.optimizer.ladder import AFFINE, EXACT, Ladder
from kvferry.cluster.optimizer.rules import Decided, digits
from kvferry.cluster.optimizer.solve import Plan
from kvferry.cluster.optimizer.worth import best_source
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_TOLD = 8192  # nodes and parts, so that a reply stays within a message's bounds


def explain_rings(outlook: Outlook, node: str = "", model: bytes = b"") -> list[pb.Decision]:
    """One decision for each set of nodes that together hold a model.

    Args:
        node: only those sets that it belongs to, and only its parts.
        model: the first bytes of a model's id.
    """
    decided, told, left = Decided.of(outlook.facts.policy), [], MAX_TOLD
    for judged in outlook.rings:
        wanted = judged.ring.model_id.startswith(model)
        if wanted and (not node or node in judged.ring.names) and left > 0:
            told.append(_decision(outlook, decided, judged, node, left))
            left -= len(told[-1].nodes) + len(told[-1].parts)
    return told


def _decision(
    outlook: Outlook, decided: Decided, judged: Judged, only: str, most: int
) -> pb.Decision:
    plan = judged.now
    problem, seconds = plan.problem, plan.seconds
    slowest = int(seconds.argmax())
    model = digits(judged.ring.model_id)
    chosen = any((h.node_id, model) in decided.runs for h in judged.ring.holders)
    made = pb.Decision(
        model_id=judged.ring.model_id,
        budget_nats=problem.budget,
        kl_nats=plan.kl,
        tokens=problem.tokens,
        seconds=plan.deadline,
        slowest=judged.ring.holders[slowest].node_id,
        why=_why(judged, chosen) + _against_prefill(outlook, judged),
        tier=outlook.tier,
        prefill_s=problem.tokens * judged.worth.prefill_s,
        pays_from_tokens=judged.worth.from_tokens or 0,
        never_pays=judged.worth.from_tokens is None,
        not_stored=judged.ring.model_id in outlook.unstored,
    )
    carried = problem.tokens * (plan.bits + problem.fixed_bits) / 8
    sent = 8 * carried / problem.bandwidth
    for node, holder in enumerate(judged.ring.holders):
        if len(made.nodes) + len(made.parts) >= most:
            break
        source, source_bytes_per_s = best_source(holder)
        made.nodes.add(
            node_id=holder.node_id,
            bytes_per_s=problem.bandwidth[node] / 8,
            latency_s=holder.latency_s,
            decode_s=max(0.0, seconds[node] - holder.latency_s - sent[node]),
            bytes=round(carried[node]),
            seconds=seconds[node],
            measured=holder.bytes_per_s > 0,
            best_source=source if source_bytes_per_s > 0 else "",
            best_bytes_per_s=source_bytes_per_s,
        )
        held = np.flatnonzero(problem.share[node] > 0)
        for group in held if only in ("", holder.node_id) else ():
            made.parts.append(_part(judged, node, int(group), slowest))
    return made


def _why(judged: Judged, chosen: bool) -> str:
    now, best = judged.now.deadline, judged.best.deadline
    if judged.gain or judged.urgent:
        return f"about to change: {best:.3g} s instead of {now:.3g} s"
    if chosen:
        return f"decided by the optimizer: the best of today would be {best:.3g} s"
    if not any(holder.bytes_per_s > 0 for holder in judged.ring.holders):
        return "one step for all: no link to the store is measured yet"
    least = f"{GAIN:.0%} or {1e3 * LEAST_GAIN_S:.0f} ms"
    return f"one step for all: choosing would gain less than {least} ({best:.3g} s)"


def _against_prefill(outlook: Outlook, judged: Judged) -> str:
    """Nodes fetch nothing that they compute sooner; so that is worth a word."""
    worth, model = judged.worth, judged.ring.model_id
    if not worth.prefill_s:
        return ""
    tokens = judged.now.problem.tokens
    prefill = f"prefill takes {tokens * worth.prefill_s:.3g} s"
    if worth.from_tokens is not None:
        if model in outlook.unstored:
            return f"; {prefill}: restores pay again, and it is about to be stored"
        if not worth.from_tokens:
            return f"; {prefill}"
        # The deadline is that of the store.
        nearer = judged.now.deadline >= tokens * worth.prefill_s
        where = ", from where it is nearer than the store" if nearer else ""
        return f"; {prefill}: a restore pays from {worth.from_tokens:,} tokens on{where}"
    told = f"; {prefill}, no restore of as much less than {tokens * worth.each_s:.3g} s"
    if model in outlook.unstored:
        return f"{told}: restores do not pay, so that nothing is stored"
    if model in outlook.turning:
        return f"{told}: restores do not pay, so that nothing is about to be stored"
    if any(r.worth.from_tokens is not None for r in outlook.rings if r.ring.model_id == model):
        stays = "other nodes that hold the model gain by it"
    else:
        stays = "nodes may have it themselves, or it is by so little that rates may move"
    return f"{told}: restores do not pay here; still stored, as {stays}"


def _part(judged: Judged, node: int, group: int, slowest: int) -> pb.PartChoice:
    plan, holder = judged.now, judged.ring.holders[node]
    ladder, share = plan.problem.ladder, plan.problem.share[node, group]
    start, end = ladder.layers[group]
    column = int(plan.choice[node, group])
    choice = ladder.choices[column]
    held = [(max(a, start), min(b, end)) for (a, b), _ in holder.parts if a < end and start < b]
    heads = [heads for (a, b), heads in holder.parts if a < end and start < b]
    made = pb.PartChoice(
        node_id=holder.node_id,
        layer_start=min(a for a, _ in held),
        layer_end=max(b for _, b in held),
        head_start=min(a for a, _ in heads),
        head_end=max(b for _, b in heads),
        codec=choice.codec,
        options=dict(choice.options),
        bytes=round(plan.problem.tokens * share * ladder.bits[group, column] / 8),
        kl_nats=share * ladder.kl[group, column],
        why=_part_why(plan, node, group, slowest, holder.node_id),
    )
    finer, coarser = neighbours(ladder, group, column)
    if finer is not None:
        made.finer.CopyFrom(_next(plan, node, group, finer))
    if coarser is not None:
        made.coarser.CopyFrom(_next(plan, node, group, coarser))
    return made


def neighbours(ladder: Ladder, group: int, column: int) -> tuple[int | None, int | None]:
    """The next finer and the next coarser choice of a group that no other is better than."""
    bits, kl = ladder.bits[group, : ladder.count], ladder.kl[group, : ladder.count]
    taken, lost = ladder.bits[group, column], ladder.kl[group, column]
    finer = np.flatnonzero(kl < lost)
    coarser = np.flatnonzero(bits < taken)
    up = int(finer[np.lexsort((kl[finer], bits[finer]))[0]]) if finer.size else None
    down = int(coarser[np.lexsort((bits[coarser], kl[coarser]))[0]]) if coarser.size else None
    return up, down


def _next(plan: Plan, node: int, group: int, column: int) -> pb.NextChoice:
    ladder, share = plan.problem.ladder, plan.problem.share[node, group]
    old = plan.choice[node, group]
    bits = share * (ladder.bits[group, column] - ladder.bits[group, old])
    carried = plan.problem.tokens * bits
    return pb.NextChoice(
        name=str(ladder.choices[column]),
        bytes=round(carried / 8),
        kl_nats=share * (ladder.kl[group, column] - ladder.kl[group, old]),
        seconds=carried / plan.problem.bandwidth[node],
    )


def _part_why(plan: Plan, node: int, group: int, slowest: int, name: str) -> str:
    ladder = plan.problem.ladder
    choice = ladder.choices[int(plan.choice[node, group])]
    if choice == EXACT:
        return "nothing coarser keeps the budget"
    if choice == AFFINE:
        return "its curve says that finer steps cost more than 8 bits do"
    spare = plan.deadline - plan.seconds[node]
    if node == slowest:
        return f"{name} is the slowest: as coarse as the budget allows"
    if spare > 0.1 * plan.deadline:
        return f"{name} has {spare:.3g} s to spare, and finer here would be bytes for nothing"
    return f"{name} is done at the same time, {spare:.3g} s before the slowest"
