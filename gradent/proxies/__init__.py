"""Cheap stand-ins for a pair's Gram entries, each from a forward alone: CHES and the head's block.

`gradent.proxies.ches(model, batch)`, `gradent.proxies.head_gram(model, batch)`, and both at once by `measure_proxies`.
"""

from gradent.proxies.scores import PairProxies, ches, head_gram, measure_proxies

__all__ = ["PairProxies", "ches", "head_gram", "measure_proxies"]
