"""Which codec and step each node uses for each layer group: pure functions over NumPy.

The problem. Nodes n together hold a model; x[n,g] in [0, 1] is the share of layer group g
(layers times heads) that n holds. For each part a choice r out of a ladder: ``ferry`` at one
of the steps 2^(k/8), 8-bit ``affine``, or exact. Group g under r takes b[g,r] bits a token
and costs k[g,r] nats of mean KL: its calibration's curve, scaled at every step so that the
groups' sum is what the whole model was measured to lose there. It has w[g] values a token,
each of which takes n d[n,r] seconds to decode, by the codec. A restore of t tokens has n
wait for

    T[n] = latency[n] + t * sum_g x[n,g] * (b[g,r(n,g)] / bandwidth[n] + w[g] * d[n,r(n,g)])

and ends with the last of them, so that

    minimize over r   max_n T[n]   subject to   sum_{n,g} x[n,g] * k[g,r(n,g)] <= budget.

How it is solved. A deadline T leaves every node a number of bits; the least KL within them
is a problem of that node alone (`frontier`), and T can be met if the least KLs add up to no
more than the budget (`solve`). Both the bits and the least KL are monotone in T, so the
least T is found by bisection. Within a node, where b and k are convex, the least KL has equal
slopes dk/db in all of its groups (the Lagrangian of its allowance), which is to walk along the
groups' lower convex hulls in the order of their slopes: all nodes share that order, and one
cumulative sum answers for every T. Nodes with up to three parts are solved exactly, as the
set of all undominated combinations.

Decoding counts, but larger blobs are never chosen for being decoded sooner: over a quick link
8 bits often are, and all stores would fill several times as fast. So a node's choices are
those that no other is better than in both bits and KL, whatever its link; and one of them
never counts as sooner than one with fewer bits. Whoever wants that trade has a rule with
``codec = "affine"`` for the node.

What follows from that, and is tested: more bandwidth, less latency or a larger budget never
gives a later deadline; a larger budget never gives any node larger blobs; the budget is
kept; on small cases nothing is better (brute force).

Whether restores pay at all, against prefill, and over which links, is another question:
`worth`.

Two things are kept out of the formula's way. A node beside the store would, for nothing that
anybody notices, hold its part exactly: no node spends more than `solve.SPREAD` times the
bits per value of the scarcest one, which keeps all of the above. And several sets of nodes
may hold the same model (`rings`); a reader takes any of their blobs, so that the budget has
to hold for the worst mixture (`mixture`).
"""
