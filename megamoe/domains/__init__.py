"""Ranks in several NVLink domains: which rank is where, what travels between domains, and the layer on top.

`ranks_per_domain` neighbours are one domain. A token's row (`rows.py`: e4m3 bytes, scale factors, ids, weights) goes to
the rank of its own index in each domain that has one of its experts. There it is a further token of that rank: the
domain's engine is the one of a single domain. Its bf16 output is the partial sum that goes back, and
`steps.add_domains` adds these in the order of domains.

`engine.py` has two ways to cut a call: *fixed* pieces (every domain gets every row; nothing depends on the routing) and
*rounds* (only what is asked for, counts on the host). Of two pieces, one is exchanged on a stream of its own while the
other is served; the kernel then leaves `EXCHANGE_SMS` to NCCL, since two ranks that hold each other's SMs would wait
for ever. `transport.py` is the only place that knows torch.distributed; benchmarks/notes/0009 says what would replace
it.
"""
