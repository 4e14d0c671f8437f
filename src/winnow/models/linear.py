"""Linear layers of a `transformers` model whose products are Winnow's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from winnow.kernels.matmul import matmul

__all__ = ["NativeLinear", "use_native_products"]


class NativeLinear(nn.Linear):
    """A linear layer that multiplies with :func:`winnow.kernels.matmul.matmul`, which has no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        weight = self.weight
        if torch.is_grad_enabled() or input.dtype != weight.dtype or input.device.type != "cpu":
            return super().forward(input)
        out_RN = matmul(input.reshape(-1, self.in_features), weight, self.bias)
        return out_RN.view(*input.shape[:-1], self.out_features)


def use_native_products(model: nn.Module) -> None:
    """Make every plain linear layer of a model a :class:`NativeLinear`, with its own parameters and hooks."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NativeLinear
