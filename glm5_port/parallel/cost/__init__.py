"""What a step of a plan costs, term by term.

terms         Cost, Breakdown, and the table of terms with their formulas
step          Step: everything that a term may look at
memory        bytes of a device: weights, cache, buffers
compute       rooflines of attention, indexer, experts, head
collectives   all-reduce, all-gather, reduce-scatter, send over levels of links
moe_exchange  tokens to experts and back, in five forms
service       steps put together: TTFT, TPOT, tokens a second
"""
