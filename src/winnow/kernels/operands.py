"""Operands of the native attention kernels: checked once, and handed over by address."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.types import AttentionSpec, Segment

__all__ = ["DTYPES", "Operands", "int32_on_cpu", "queries_and_entries", "unsupported"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Arguments of a call into the extension.

    Attributes
    ----------
    arguments : dict of str to int or float
        Addresses, strides in elements, sizes and numbers.
    alive : tuple of Tensor
        What the addresses point to: keep it until the call returns.
    """

    arguments: dict[str, int | float]
    alive: tuple[Tensor, ...]


def unsupported(q_THD: Tensor, segment: Segment, spec: AttentionSpec) -> str:
    """Why a native kernel of many queries cannot take these operands; empty where it can."""
    if q_THD.dtype not in DTYPES:
        return f"queries are {q_THD.dtype}; it takes float32 and bfloat16"
    if segment.k.dtype != q_THD.dtype or segment.v.dtype != q_THD.dtype:
        return f"queries are {q_THD.dtype} but keys and values {segment.k.dtype} and {segment.v.dtype}"
    if q_THD.shape[-1] % 16:
        return f"the head size is {q_THD.shape[-1]}; it takes multiples of 16"
    if not spec.scale > 0:
        return f"the scale is {spec.scale}; it takes positive ones"
    for name, operand in (("queries", q_THD), ("keys", segment.k), ("values", segment.v)):
        if operand.device.type != "cpu":
            return f"the {name} lie on {operand.device}"
        if operand.stride(-1) != 1:
            return f"the last dimension of the {name} is not contiguous"
    return ""


def int32_on_cpu(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``tensor`` with its last dimension contiguous; refused where dtype, shape or device differ."""
    if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; give int32 {shape} on cpu"
        )
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def queries_and_entries(
    q_THD: Tensor, segment: Segment, spec: AttentionSpec, query_positions: Tensor
) -> Operands:
    """What every kernel of many queries over one segment is told; values are left to the caller.

    Raises
    ------
    ValueError
        If a shape or type contradicts another.
    """
    T, heads, D = q_THD.shape
    H, C, _ = segment.k.shape
    if segment.v.shape != segment.k.shape or segment.k.shape[2] != D or H == 0 or heads % H:
        raise ValueError(
            f"queries {tuple(q_THD.shape)}, keys {tuple(segment.k.shape)}, values {tuple(segment.v.shape)} "
            "do not go together; give [T, H * G, D] and twice [H, C, D]"
        )
    lengths = int32_on_cpu("lengths", segment.lengths, (H,))
    q_positions = int32_on_cpu("query_positions", query_positions, (T,))
    if int(lengths.max()) > C or int(lengths.min()) < 0:
        raise ValueError(
            f"lengths {lengths.tolist()} exceed the {C} reserved entries; give at most that many"
        )
    alive = [q_THD, segment.k, lengths, q_positions]
    positions, bias = segment.positions, segment.bias
    if positions is not None:
        alive.append(positions := int32_on_cpu("positions", positions, (H, C)))
    if bias is not None:
        if bias.shape != (H, C) or bias.dtype != torch.float32:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; give float32 {(H, C)}")
        alive.append(bias := bias if bias.stride(-1) == 1 else bias.contiguous())
    arguments: dict[str, int | float] = {
        "dtype": DTYPES[q_THD.dtype],
        "tokens": T,
        "kv_heads": H,
        "group": heads // H,
        "depth": D,
        "q": q_THD.data_ptr(),
        "q_token": q_THD.stride(0),
        "q_head": q_THD.stride(1),
        "k": segment.k.data_ptr(),
        "k_head": segment.k.stride(0),
        "k_entry": segment.k.stride(1),
        "lengths": lengths.data_ptr(),
        "query_positions": q_positions.data_ptr(),
        "start": segment.start,
        "positions": 0 if positions is None else positions.data_ptr(),
        "positions_head": 0 if positions is None else positions.stride(0),
        "bias": 0 if bias is None else bias.data_ptr(),
        "bias_head": 0 if bias is None else bias.stride(0),
        "scale": spec.scale,
        "softcap": spec.softcap or 0.0,
        "sliding": spec.window or 0,
    }
    return Operands(arguments=arguments, alive=tuple(alive))
