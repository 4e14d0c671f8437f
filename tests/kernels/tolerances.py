"""The one table of tolerances: (rtol, atol) of a kernel's output, by the dtype of its operands.

Outputs are averages of values of unit scale. bfloat16 kernels are compared with the float32 reference of
the same, already rounded, operands: what is left is the rounding of weights and of the result (2^-9 each,
2^-12 for float16).
"""

from __future__ import annotations

import torch

OUTPUT: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
# Log-sum-exps and logits are float32 whatever the operands: exact products, float32 sums.
LOG_SUM_EXP: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 2e-5),
    torch.float16: (1e-5, 2e-5),
    torch.bfloat16: (1e-5, 2e-4),
}
# Matrix-vector products of unit scale: float32 sums in another order, then one rounding to the dtype of x
# (AVX-512 multiplies bfloat16 pairs exactly and flushes denormal sums, far below this).
MATVEC: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (8e-3, 1e-5),
}
# The same for many rows, sums of unit scale in parts: what cancels in a sum remains in its absolute error.
MATMUL: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (8e-3, 1e-4),
}
# Attention mass: sums of probabilities, in float32. The float32 reference's own log-sum-exp is given; what is
# left is the exponential (7.5e-5 relative for bfloat16 operands) and the order of the sums.
MASS: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-5, 2e-5),
    torch.bfloat16: (3e-4, 3e-5),
}
# Cosines of exact products: the order of float32 sums, and one division.
COSINE: tuple[float, float] = (0.0, 2e-6)
# Attention over codes, (output, log-sum-exp): the kernel never rounds a key or a value, but the query times
# the scales of channels, and weights times those of entries (2^-9 each in bfloat16).
CODED: dict[torch.dtype, tuple[tuple[float, float], tuple[float, float]]] = {
    torch.float32: ((2e-5, 2e-5), (1e-5, 2e-5)),
    torch.bfloat16: ((1.6e-2, 1.6e-2), (1e-3, 8e-3)),
}
# Attention over keys that the kernel rebuilds (output, log-sum-exp and logits): a key is rounded once, by the
# reference and by the kernel, but from float32 sums in another order and angles that differ by 1e-6.
REBUILT: dict[torch.dtype, float] = {torch.float32: 5e-5, torch.bfloat16: 2e-2}
