"""SiLU inside kernels (Triton), by one slow instruction: GPUs have sixteen such units where they have 128 others.

x sigmoid(x) = x / 2 + x / 2 tanh(x / 2). The hardware's tanh is within 2^-11, so that the result is within 2^-12 |x|:
for positive x an eighth of what bfloat16 rounds, while the tail of negative x, near 0, has no accuracy of its own.
Numbers of more than 8 bits take the exact way.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def silu(x, EXACT: tl.constexpr):
    """SiLU of float32, x / (1 + exp(-x)). EXACT: to its last bits."""
    if EXACT or INTERPRETED:
        y = x / (1 + tl.exp(-x))
    else:
        half = 0.5 * x
        y = half + half * _tanh(half)
    return y


@triton.jit
def silu_gradient(x, EXACT: tl.constexpr):
    """d silu(x) / d x."""
    sigmoid = 1 / (1 + tl.exp(-x)) if EXACT or INTERPRETED else 0.5 + 0.5 * _tanh(0.5 * x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
