"""The module around the grid: what it accepts, and that it survives copies and state dicts."""

import copy

import pytest
import torch
from torch import nn

from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.quantizer import Quantizer


def test_unset_gives_nan_and_set_gives_the_grid() -> None:
    quantizer = Quantizer(QSpec(4, axis=0), 2)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert quantizer.scale.shape == (2,) and not quantizer.ready and quantizer(x).isnan().all()
    assert "no range yet" in repr(quantizer)
    scale = torch.tensor([0.1, 0.2], dtype=torch.float64)
    quantizer.set(scale)
    assert quantizer.ready and quantizer.scale.dtype == torch.float32 and quantizer.zero.tolist() == [0, 0]
    assert torch.equal(quantizer(x), fake_quantize(x, scale.float(), torch.zeros(2), QSpec(4, axis=0)))
    assert "4 bits, symmetric, axis 0, 2 channels" in repr(quantizer)


def test_set_keeps_its_own_copy() -> None:
    quantizer, scale = Quantizer(QSpec(4, axis=0), 2), torch.ones(2)
    quantizer.set(scale)
    scale.fill_(7)
    assert quantizer.scale.tolist() == [1, 1]


def test_the_implied_zero_of_each_grid() -> None:
    for spec, zero in ((QSpec(4), 0.0), (QSpec(2, grid="ternary"), 0.0), (QSpec(4, grid="dorefa"), 7.5)):
        quantizer = Quantizer(spec)
        quantizer.set(torch.tensor(1.0))
        assert quantizer.zero == zero and quantizer.zero.shape == ()


@pytest.mark.parametrize(
    ("spec", "scale", "zero", "message"),
    [
        (QSpec(4, axis=0), torch.ones(2), None, r"shape \(2,\), expected \(3,\)"),
        (QSpec(4, axis=0), torch.tensor(1.0), None, r"shape \(\), expected \(3,\)"),
        (QSpec(4), torch.ones(1), None, r"shape \(1,\), expected \(\)"),
        (QSpec(4, axis=0), torch.tensor([1.0, 0.0, 1.0]), None, "a scale is 0.0"),
        (QSpec(4), torch.tensor(-1.0), None, "a scale is -1.0"),
        (QSpec(4), torch.tensor(float("nan")), None, "a scale is nan"),
        (QSpec(4), torch.tensor(float("inf")), None, "a scale is inf"),
        (QSpec(4), torch.tensor(1e-60, dtype=torch.float64), None, "a scale is 0.0"),
        (QSpec(4, symmetric=False), torch.tensor(1.0), None, "needs a zero point"),
        (QSpec(4, symmetric=False), torch.tensor(1.0), torch.tensor(16.0), "zero point is 16.0, expected integers from 0 to 15"),
        (QSpec(4, symmetric=False), torch.tensor(1.0), torch.tensor(1.5), "zero point is 1.5"),
        (QSpec(4), torch.tensor(1.0), torch.tensor(1.0), "zero point is 1.0, expected 0.0"),
        (QSpec(4, grid="dorefa"), torch.tensor(1.0), torch.tensor(7.0), "zero point is 7.0, expected 7.5"),
        (QSpec(4, axis=0), torch.ones(3), torch.zeros(1), r"zero has shape \(1,\)"),
    ],
)
def test_set_refuses(spec: QSpec, scale: torch.Tensor, zero: torch.Tensor | None, message: str) -> None:
    quantizer = Quantizer(spec, None if spec.axis is None else 3)
    with pytest.raises(NetworkError, match=message):
        quantizer.set(scale, zero)
    assert not quantizer.ready


@pytest.mark.parametrize("channels", [None, 3])
def test_state_dict_and_copy(channels: int | None) -> None:
    spec = QSpec(8, symmetric=False, axis=1)
    quantizer = Quantizer(spec, channels)
    quantizer.set(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 5.0, 255.0]))
    fresh = nn.Sequential(Quantizer(spec, channels))
    fresh.load_state_dict(nn.Sequential(quantizer).state_dict())
    loaded = fresh[0]
    copied = copy.deepcopy(quantizer)
    quantizer.set(torch.ones(3), torch.zeros(3))
    for each in (loaded, copied):
        assert isinstance(each, Quantizer) and each.spec == spec
        assert each.scale.tolist() == [1, 2, 3] and each.zero.tolist() == [0, 5, 255]
        assert each(torch.ones(1, 3)).shape == (1, 3)


def test_state_dict_of_another_size_is_refused() -> None:
    quantizer = Quantizer(QSpec(8, axis=0), 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        quantizer.load_state_dict({"scale": torch.ones(4), "zero": torch.zeros(4)})
    open_size = Quantizer(QSpec(8, axis=0))
    with pytest.raises(RuntimeError, match="size mismatch"):
        open_size.load_state_dict({"scale": torch.ones(4, 2), "zero": torch.zeros(4, 2)})


def test_weights_get_gradients_and_ranges_do_not() -> None:
    quantizer = Quantizer(QSpec(4))
    quantizer.set(torch.tensor(0.5))
    x = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 1]
    assert not list(quantizer.parameters()) and set(quantizer.state_dict()) == {"scale", "zero"}
