"""Operations of the network; models import these names and nothing below.

Each has a plain twin in `reference.py`, where its shapes are, and a fused implementation for GPUs. Which one runs is
decided when this package is loaded: the fused one where the environment says LONGSANA_OPS=triton, on an NVIDIA GPU of
compute capability 8.0 or newer. It will be the default once it has run on one. Tensors on a CPU, in float64, or under
torch.compile, which fuses on its own, always go to the twins.
"""

from longsana.ops.backend import BACKEND, operation
from longsana.ops.reference import (
    add_norm_modulate,
    add_temporal_conv,
    gated_conv,
    gated_residual,
    linear_attention,
    norm_modulate,
    qk_features,
)

add_norm_modulate = operation(add_norm_modulate, "norms")
gated_conv = operation(gated_conv, "gated_conv")
gated_residual = operation(gated_residual, "norms")
linear_attention = operation(linear_attention, "attention")
norm_modulate = operation(norm_modulate, "norms")
qk_features = operation(qk_features, "norms")
add_temporal_conv = operation(add_temporal_conv, "temporal")

__all__ = [
    "BACKEND",
    "add_norm_modulate",
    "add_temporal_conv",
    "gated_conv",
    "gated_residual",
    "linear_attention",
    "norm_modulate",
    "qk_features",
]
