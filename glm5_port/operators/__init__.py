"""What each operator means: contract, reference, static facts, fake, error budget. Imports no backend.

    norm              rms_norm, add_rms_norm
    rope              rotate, and the plain function rotary_angles
    cache             write_cache, CacheLayout; the built-in layouts are in cache_layouts
"""

from glm5_port.operators import cache_layouts as cache_layouts
from glm5_port.operators.cache import write_cache
from glm5_port.operators.norm import add_rms_norm, rms_norm
from glm5_port.operators.rope import rotate

__all__ = ["add_rms_norm", "rms_norm", "rotate", "write_cache"]
