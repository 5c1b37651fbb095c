"""Portable PyTorch implementations: the first-day implementation of any chip. They name no device.

Importing this package registers them; each module mirrors one of `glm5_port.operators`.
"""

from glm5_port.backends.torch import cache, exchange, indexer, int4, int4_measured, linear, mla, moe, norm, rope, sparse_attention

__all__ = ["cache", "exchange", "indexer", "int4", "int4_measured", "linear", "mla", "moe", "norm", "rope", "sparse_attention"]
