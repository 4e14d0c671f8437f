"""A look at every weight: refuse NaN and make a digest that names the model."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["fingerprint"]

_WORDS = 512  # 8-byte words under one checksum: 4 KiB
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def fingerprint(model: PreTrainedModel, name: str) -> str:
    """Digest of configuration and weights; reads every byte twice, at the speed of memory.

    Weights enter as one 64-bit sum per 4 KiB, hashed with the tensor's name, shape and dtype: a
    change of any single value shows. It guards against mistakes, not against an adversary, who
    could reorder words within 4 KiB.

    Raises
    ------
    ValueError
        If a tensor holds NaN or infinity, or has no data.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    seen: set[tuple[int, torch.Size]] = set()
    for weight_name, weight in sorted(model.state_dict().items()):
        if weight.is_meta:
            raise ValueError(f"{name}: weight {weight_name} has no data; load the model with its weights")
        if (key := (weight.data_ptr(), weight.shape)) in seen:
            continue  # tied
        seen.add(key)
        if (
            weight.is_floating_point()
            and weight.numel()
            and not all(bool(x.isfinite()) for x in weight.aminmax())
        ):
            raise ValueError(
                f"{name}: weight {weight_name} contains NaN or infinity; download or convert the model again"
            )
        digest.update(f"{weight_name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_sums(weight).numpy().tobytes())
    return digest.hexdigest()


def _sums(weight: Tensor) -> Tensor:
    """``[ceil(bytes / 4096) + tail]`` int64 sums of the bytes of a tensor (on the CPU)."""
    raw = weight.detach().contiguous().flatten().view(torch.uint8)
    whole = raw.numel() // (8 * _WORDS) * 8 * _WORDS
    # Slicing keeps storage offsets that a view as int64 cannot express: align by copying the tail only.
    head = raw[:whole]
    if head.data_ptr() % 8:
        head = head.clone()
    blocks = head.view(torch.int64).view(-1, _WORDS).sum(1)
    return torch.cat((blocks.cpu(), raw[whole:].long().cpu()))
