"""What each operator means: contract, reference, static facts, fake, error budget. Imports no backend.

    norm              rms_norm, add_rms_norm
"""

from glm5_port.operators.norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
