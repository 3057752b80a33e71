"""Operations of the network; models import these names and nothing below.

Each has a plain twin in `reference.py`, where its shapes are, and a fused implementation for GPUs. Which one runs is
decided at the first operation on a GPU: the fused one on an NVIDIA GPU of compute capability 8.0 or newer, with tiles
that fit its shared memory, unless the environment says LONGSANA_OPS=reference. Tensors on a CPU or in float64 always go
to the twins, and under torch.compile, which fuses on its own, all but what `keep_in_compiled_code` names.
"""

from longsana.ops import reference
from longsana.ops.dispatch import backend, operation
from longsana.ops.reference import Float8Rows

FUSED = {
    "add_norm_modulate": "norms",
    "add_norm_modulate_rows": "float8",
    "add_shortcut": "decoder",
    "caption_attention": "caption",
    "copy_into": "decoder",
    "gated_conv": "gated_conv",
    "gated_residual": "norms",
    "gated_residual_rows": "float8",
    "linear_attention": "attention",
    "neighbour_rows": "float8",
    "norm_modulate": "norms",
    "norm_modulate_rows": "float8",
    "norm_silu_into": "decoder",
    "qk_features": "norms",
    "quantise_rows": "float8",
    "relu_into": "decoder",
    "temporal_conv": "temporal",
}
"""Module of this package that holds the fused implementation, under the same name."""

add_norm_modulate = operation(reference.add_norm_modulate, FUSED)
add_norm_modulate_rows = operation(reference.add_norm_modulate_rows, FUSED)
add_shortcut = operation(reference.add_shortcut, FUSED)
caption_attention = operation(reference.caption_attention, FUSED)
copy_into = operation(reference.copy_into, FUSED)
gated_conv = operation(reference.gated_conv, FUSED)
gated_residual = operation(reference.gated_residual, FUSED)
gated_residual_rows = operation(reference.gated_residual_rows, FUSED)
linear_attention = operation(reference.linear_attention, FUSED)
neighbour_rows = operation(reference.neighbour_rows, FUSED)
norm_modulate = operation(reference.norm_modulate, FUSED)
norm_modulate_rows = operation(reference.norm_modulate_rows, FUSED)
norm_silu_into = operation(reference.norm_silu_into, FUSED)
qk_features = operation(reference.qk_features, FUSED)
quantise_rows = operation(reference.quantise_rows, FUSED)
relu_into = operation(reference.relu_into, FUSED)
temporal_conv = operation(reference.temporal_conv, FUSED)

__all__ = [
    "FUSED",
    "Float8Rows",
    "add_norm_modulate",
    "add_norm_modulate_rows",
    "add_shortcut",
    "backend",
    "caption_attention",
    "copy_into",
    "gated_conv",
    "gated_residual",
    "gated_residual_rows",
    "linear_attention",
    "neighbour_rows",
    "norm_modulate",
    "norm_modulate_rows",
    "norm_silu_into",
    "qk_features",
    "quantise_rows",
    "relu_into",
    "temporal_conv",
]
