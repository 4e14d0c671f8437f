"""Linear layers of the twin multiply natively; the user's own model is left as it is."""

from __future__ import annotations

import pytest
import torch
from tests.parity.families import make
from torch import nn

from winnow.models import linear
from winnow.models.hf import HFModel
from winnow.models.linear import NativeLinear, use_native_products


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the native products that were made."""
    seen: list[int] = []
    native = linear.matmul
    monkeypatch.setattr(linear, "matmul", lambda x, *rest: seen.append(len(x)) or native(x, *rest))
    return seen


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A layer and a native one with its parameters."""
    torch.manual_seed(0)
    plain = nn.Linear(40, 24, bias=bias)
    other = nn.Linear(40, 24, bias=bias)
    other.load_state_dict(plain.state_dict())
    use_native_products(other)
    return plain, other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 60, 40)])
def test_equals_the_plain_layer(products: list[int], shape: tuple[int, ...], bias: bool) -> None:
    plain, native = layers(bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(native(x), plain(x), rtol=1e-5, atol=1e-5)
    assert products == [x.numel() // 40]


def test_gradients_are_the_plain_layer_s(products: list[int]) -> None:
    plain, native = layers()
    x = torch.randn(3, 40)
    for one in (plain, native):
        one(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, native.weight.grad)
    assert not products


def test_other_dtypes_are_refused_as_by_the_plain_layer(products: list[int]) -> None:
    plain, native = layers()
    for one in (plain, native):
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            one(torch.randn(3, 40, dtype=torch.float64))
    assert not products


def test_a_subclass_keeps_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    use_native_products(model)
    assert [type(m) for m in model] == [Doubled, NativeLinear]


def test_the_twin_multiplies_natively_with_the_user_s_parameters(products: list[int]) -> None:
    model = make("gemma2")
    twin = HFModel(model).module
    # Its probe: four products of attention and three of the feed-forward part in a layer, then the head.
    assert len(products) == 7 * model.config.num_hidden_layers + 1
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {type(m) for m in twin.modules() if isinstance(m, nn.Linear)} == {NativeLinear}
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
