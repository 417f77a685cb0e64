"""What is computed in double precision stays off devices that lack it, and its results come back to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datafree.closed.clip import best_range
from datafree.plan import QSpec
from datafree.quant import precision
from datafree.quant.precision import float64
from datafree.quant.ranges import from_range, optimal_ternary, twn
from datafree.tune.features import refined
from house_rules import code_files

GPU = "meta"  # stands for one without double precision: its tensors have shapes only


class NoDoubles(TorchDispatchMode):
    """Refuses every operation that gives a float64 tensor on the device; numbers read from there are ones."""

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        given, named, name = args[0] if args else None, kwargs or {}, str(func)
        far = isinstance(given, Tensor) and given.device.type == GPU
        if far and "_local_scalar_dense" in name:
            return True
        if isinstance(given, Tensor) and far and "_to_copy" in name and named.get("device") == torch.device("cpu"):
            dtype = named.get("dtype")
            return torch.ones(given.shape, dtype=dtype if isinstance(dtype, torch.dtype) else given.dtype)
        found = func(*args, **named)
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                assert each.device.type == "cpu", f"{func} gave float64 on {each.device}"
        return found


def test_double_precision_moves_to_the_cpu_where_the_device_has_none() -> None:
    assert not precision.has_float64(torch.device("mps"))
    assert all(precision.has_float64(torch.device(each)) for each in ("cpu", "cuda"))


@pytest.mark.parametrize(
    "compute",
    (
        lambda x: from_range(x.amin(1), x.amax(1), QSpec(4, symmetric=False, axis=0)),
        lambda x: from_range(x.amin(1), x.amax(1), QSpec(4, axis=0)),
        lambda x: twn(x),
        lambda x: optimal_ternary(x),
        lambda x: best_range([(x[0], x[1])], QSpec(4, symmetric=False)),
        lambda x: refined(x[:, :, None, None], x[:, :, None, None]),
    ),
    ids=("asymmetric", "symmetric", "twn", "ternary", "expected error", "refined"),
)
def test_results_come_back_to_the_device(monkeypatch: pytest.MonkeyPatch, compute: Callable[[Tensor], object]) -> None:
    with NoDoubles():
        x = torch.empty(4, 6, device=GPU)
        with pytest.raises(AssertionError, match="gave float64 on meta"):  # where the device has it, it is used there
            compute(x)
        monkeypatch.setattr(precision, "has_float64", lambda device: device.type != GPU)
        found = compute(x)
        for each in found if isinstance(found, tuple) else (found,):
            assert each.device.type == GPU and each.dtype != torch.float64
        assert float64(x).device.type == "cpu"


def test_only_numbers_on_the_cpu_are_made_double_in_another_way() -> None:
    on_the_cpu = {
        "datafree/quant/precision.py", "datafree/checks.py", "datafree/methods/squant.py", "datafree/closed/moments.py",
        "datafree/closed/clip.py",
        "datafree/closed/ranges.py", "datafree/measure/estimate.py", "datafree/measure/fidelity.py", "datafree/measure/verify.py",
    }  # fmt: skip
    found = {each.path for each in code_files("datafree") if ".double()" in each.source or "torch.float64" in each.source}
    assert found <= on_the_cpu, f"take datafree.quant.precision.float64 in {', '.join(sorted(found - on_the_cpu))}"
