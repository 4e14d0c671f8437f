"""The Triton decode kernel over packed rows, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_bitmap_decode import layer
from tests.kernels.tolerances import LOG_SUM_EXP, OUTPUT
from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.bitmap_decode import bitmap_decode
from winnow.types import AttentionSpec, Selection

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("size", "kept"), [(16, 8), (64, 20)])
@pytest.mark.parametrize("listed", [False, True])
def test_equals_the_reference(dtype, size, kept, listed):
    q, segment, masks, _ = layer([131, 77], size=size, kept=kept, dtype=dtype)
    selection = None
    if listed:
        indices = torch.tensor([[0, 3, 5, 7], [1, 2, 4, 0]], dtype=torch.int32)
        selection = Selection(indices=indices, counts=torch.tensor([4, 3], dtype=torch.int32), page=8)
    call = {
        "spec": AttentionSpec(scale=size**-0.5),
        "position": 400,
        "selection": selection,
        "want_logits": True,
    }
    got = interpreted(
        "winnow.kernels.bitmap_decode:bitmap_decode", q, segment, masks, backend="triton", **call
    )
    want = bitmap_decode(q, segment, masks, backend="reference", **call)
    rtol, atol = OUTPUT[dtype]
    torch.testing.assert_close(got.out, want.out, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.logits, want.logits, rtol=rtol, atol=atol)
    rtol, atol = LOG_SUM_EXP[dtype]
    torch.testing.assert_close(got.lse, want.lse, rtol=rtol, atol=atol)
    assert got.pairs == want.pairs
