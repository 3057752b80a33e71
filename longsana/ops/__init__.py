"""Operations of the network; models import these names and nothing below."""

from longsana.ops.decoder import norm_silu_into
from longsana.ops.reference import linear_attention, temporal_conv

__all__ = ["linear_attention", "norm_silu_into", "temporal_conv"]
