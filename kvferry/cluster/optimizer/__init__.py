"""Which codec and step each node uses for each layer group: pure functions over NumPy.

The problem. Nodes n together hold a model; x[n,g] in [0, 1] is the share of layer group g
(layers times heads) that n holds. For each part a choice r out of a ladder: ``ferry`` at one
of the steps 2^(k/8), 8-bit ``affine``, or exact. Group g under r takes b[g,r] bits a token
and costs k[g,r] nats of mean KL: its calibration's curve, scaled at every step so that the
groups' sum is what the whole model was measured to lose there. A restore of t tokens has n
wait for

    T[n] = latency[n] + decode[n] + t * sum_g x[n,g] * b[g,r(n,g)] / bandwidth[n]

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

What follows from that, and is tested: more bandwidth, less latency or a larger budget never
gives a later deadline; a larger budget never gives any node larger blobs; the budget is
kept; on small cases nothing is better (brute force).

Two things are kept out of the formula's way. A node beside the store would, for nothing that
anybody notices, hold its part exactly: no node spends more than `solve.SPREAD` times the
bits per value of the scarcest one, which keeps all of the above. And several sets of nodes
may hold the same model (`rings`); a reader takes any of their blobs, so that the budget has
to hold for the worst mixture (`mixture`).
"""
