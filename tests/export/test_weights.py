"""Files of students and of float weights: exact, whole or absent, and never run code."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datafree.bits.cost import packed_bytes
from datafree.errors import NetworkError, OutputError, WeightsError
from datafree.export import weights
from datafree.export.float_weights import load_weights, weights_hash
from datafree.export.weights import load_student, save_student
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.freeze import freeze
from datafree.quant.insert import insert, latent_weight, plan_of, quantized_layers, quantizers
from datafree.quant.observe import observe

A8 = QSpec(8, symmetric=False)
PLAN = Plan(
    {
        "0": LayerPlan(QSpec(8, axis=0), A8),
        "3": LayerPlan(QSpec(2, axis=0, grid="ternary"), A8),
        "5": LayerPlan(QSpec(3, symmetric=False, axis=1)),
        "8": LayerPlan(QSpec(5, grid="dorefa"), QSpec(6, axis=1)),
    },
    {"2:output": A8},
)


def network(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 6, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    model(torch.randn(8, 2, 6, 6))
    return model.eval()


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student() -> nn.Module:
    made = insert(network(), PLAN)
    observe(made, [inputs()], "minmax", lambda model, batch: model(batch))
    return made


@pytest.fixture
def saved(student: nn.Module, tmp_path: Path) -> Path:
    save_student(student, tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


def test_a_student_comes_back_bit_for_bit(student: nn.Module, saved: Path) -> None:
    other = network(seed=5)
    before = weights_hash(other)
    loaded = load_student(saved, other)
    assert torch.equal(loaded(inputs(2)), student(inputs(2))) and plan_of(loaded) == plan_of(student) == PLAN
    assert weights_hash(other) == before and not quantized_layers(other)
    for name, part in freeze(student).items():
        assert torch.equal(freeze(loaded)[name].codes, part.codes)
    save_student(loaded, str(saved.with_name("again.safetensors")))
    assert saved.with_name("again.safetensors").read_bytes() == saved.read_bytes()


def test_the_file_holds_codes_and_no_float_weights(saved: Path) -> None:
    tensors = load_file(saved)
    assert {key for key in tensors if key.startswith("5.")} == {"5.weight.codes", "5.weight.scale", "5.weight.zero", "5.bias"}
    assert tensors["0.weight.codes"].numel() == 2 * 4 * 9 and tensors["3.weight.codes"].numel() == 16 // 4
    assert tensors["8:input.scale"].shape == (6,) and "8.weight.zero" not in tensors
    assert not any("parametrizations" in key or "quantizer" in key for key in tensors)


def test_the_file_is_as_large_as_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 500), nn.ReLU(), nn.Linear(500, 200)).eval()
    student = insert(model, Plan({"0": LayerPlan(QSpec(3, axis=0)), "2": LayerPlan(QSpec(4, symmetric=False, axis=0))}))
    save_student(student, tmp_path / "s.safetensors")
    size = (tmp_path / "s.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "s.safetensors").read_bytes()[:8], "little")
    assert size - header == packed_bytes(student) and size < 1.03 * packed_bytes(student)


def test_only_whole_files_appear(student: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(weights, "save_file", half)
    for name in (saved.name, "new.safetensors"):
        with pytest.raises(OutputError, match="the disk is full"):
            save_student(student, saved.with_name(name))
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]
    with pytest.raises(OutputError, match="there is no folder"):
        save_student(student, saved.parent / "missing" / "s.safetensors")


def test_a_file_may_be_read_by_whom_the_umask_lets(saved: Path) -> None:
    (saved.parent / "plain").touch()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_unset_ranges_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="without a range: 0:input, 2:output, 3:input, 8:input: observe"):
        save_student(insert(network(), PLAN), tmp_path / "s.safetensors")
    assert not os.listdir(tmp_path)


def test_shared_weights_and_modules_are_stored_once(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.c, self.d = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.d.weight = self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.d(self.c(self.b(self.a(x)))))

    torch.manual_seed(1)
    student = insert(Shared(), Plan({"a": LayerPlan(QSpec(4, axis=0))}))
    save_student(student, tmp_path / "s.safetensors")
    assert set(load_file(tmp_path / "s.safetensors")) == {"a.weight.codes", "a.weight.scale", "a.bias", "c.weight"}
    torch.manual_seed(2)
    assert torch.equal(load_student(tmp_path / "s.safetensors", Shared())(torch.ones(1, 4)), student(torch.ones(1, 4)))


def test_damaged_files(saved: Path) -> None:
    whole = saved.read_bytes()
    for data in (b"", b"nonsense", whole[:5], whole[:300], whole[:-1]):
        saved.write_bytes(data)
        with pytest.raises(WeightsError, match="damaged"):
            load_student(saved, network())
    with pytest.raises(WeightsError, match="there is no file"):
        load_student(saved.with_name("absent"), network())


HEADER = json.dumps({"version": 1, "plan": PLAN.to_json()})


def edited(path: Path, tensors: Callable[[dict[str, Tensor]], object], header: str = HEADER) -> None:
    parts = load_file(path)
    tensors(parts)
    save_file(parts, path, {"datafree": header})


def test_files_of_another_kind(saved: Path) -> None:
    for header, message in (
        (HEADER.replace('"version": 1', '"version": 99'), "has version 99 of the format, this datafree reads 1"),
        ("{", "the plan in .* is damaged"),
        ("{}", "the plan in .* is damaged"),
        ("[1]", "the plan in .* is damaged"),
        ('{"version": 1, "plan": {"layers": 3}}', "the plan in .* is damaged"),
    ):
        edited(saved, lambda tensors: None, header)
        with pytest.raises(WeightsError, match=message):
            load_student(saved, network())
    save_file({"x": torch.ones(1)}, saved)
    with pytest.raises(WeightsError, match="is no student of datafree: for weights of a float network use load_weights"):
        load_student(saved, network())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("0.bias"), "missing 0.bias; unexpected none"),
        (lambda t: t.update(extra=torch.ones(1)), "missing none; unexpected extra"),
        (lambda t: t.update({"0.bias": torch.ones(5)}), r"0.bias is torch.float32 \(5,\) instead of torch.float32 \(4,\)"),
        (lambda t: t.update({"0.bias": torch.ones(4).double()}), "0.bias is torch.float64"),
        (lambda t: t.update({"0.weight.codes": torch.zeros(3, dtype=torch.uint8)}), r"0.weight.codes is torch.uint8 \(3,\)"),
        (lambda t: t.update({"0.weight.scale": torch.zeros(4)}), "is damaged at 0: .* a scale is 0.0"),
        (lambda t: t.update({"3.weight.codes": torch.full((4,), 255, dtype=torch.uint8)}), "is damaged at 3: .* a code is 2"),
        (lambda t: t.update({"8:input.scale": torch.ones(6, 1)}), r"is damaged at 8:input: .* shape \(6, 1\)"),
        (lambda t: t.update({f"x{k}": torch.ones(1) for k in range(8)}), "unexpected x0, x1, x2, x3, x4 and 3 more"),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edited(saved, edit)
    with pytest.raises(WeightsError, match=message):
        load_student(saved, network())


def test_networks_that_do_not_fit(saved: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"does not fit the network: 0.bias is torch.float32 \(4,\) instead of torch.float32 \(8,\).* and 5 more"
    ):
        load_student(saved, network(width=8))
    with pytest.raises(WeightsError, match="does not fit the network: the network has no module '5'"):
        load_student(saved, network()[:5])


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_float_weights_come_back(tmp_path: Path, ending: str, prefix: str) -> None:
    source, model, file = network(1), network(2), tmp_path / f"w{ending}"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    if ending == ".safetensors":
        save_file(state, file)
    elif prefix:
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        torch.save(state, file)
    assert weights_hash(model) != weights_hash(source)
    load_weights(model, file)
    assert weights_hash(model) == weights_hash(source)


def test_old_files_without_batch_counters(tmp_path: Path) -> None:
    source, model = network(1), network(2)
    torch.save({key: value for key, value in source.state_dict().items() if "num_batches" not in key}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model(inputs()), source(inputs()))


class Evil:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    torch.save({"0.weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"0.weight": Evil(tmp_path / "ran")}, protocol=2))
    for name in ("evil.pt", "plain.pth"):
        with pytest.raises(WeightsError, match=r"is refused: it holds objects other than tensors.*, and opening it could run code"):
            load_weights(network(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_float_files_that_cannot_be_read(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for data in (b"", b"nonsense", whole[: len(whole) // 2]):
        for name in ("cut.pt", "cut.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(WeightsError, match="damaged"):
                load_weights(network(), tmp_path / name)
    at = whole.index(b"running_mean")
    (tmp_path / "flipped.pt").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(WeightsError, match="flipped.pt is damaged"):
        load_weights(network(), tmp_path / "flipped.pt")
    for content, message in (
        ([1, 2], "holds no state dict, but a list"),
        ({"a": 3}, "holds no state dict, but a dictionary with a int under 'a'"),
        ({1: torch.ones(1)}, "a Tensor under 1"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(WeightsError, match=message):
            load_weights(network(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="there is no file"):
        load_weights(network(), tmp_path / "absent.pt")
    (tmp_path / "w.onnx").write_bytes(whole)
    with pytest.raises(WeightsError, match="are read from .safetensors, .pt, .pth, .ckpt, .bin or .tar, not .onnx"):
        load_weights(network(), tmp_path / "w.onnx")


def test_float_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = network()
    before = weights_hash(model)
    save_file({f"layer{k}": torch.ones(1) for k in range(7)}, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError, match="missing 0.weight, .*, 1.running_mean; none of its 12 names is in the file, which has layer0, .* and 2"
    ):
        load_weights(model, tmp_path / "w.safetensors")
    save_file({**network(3).state_dict(), "0.bias": torch.ones(9)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"wrong shapes: 0.bias \(9,\) instead of \(4,\)"):
        load_weights(model, tmp_path / "w.safetensors")
    assert weights_hash(model) == before


def test_the_hash_sees_names_types_shapes_and_bytes() -> None:
    def holding(**tensors: Tensor) -> nn.Module:
        module = nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return module

    base = torch.arange(6.0)
    variants = [
        holding(a=base),
        holding(b=base),
        holding(a=base.reshape(2, 3)),
        holding(a=base.view(torch.int32)),
        holding(a=base + 1e-6),
        holding(a=base.bfloat16()),
        holding(a=base, b=torch.tensor(True)),
        holding(),
    ]
    assert len({weights_hash(each) for each in variants}) == len(variants)
    assert weights_hash(holding(a=base, b=base)) == weights_hash(holding(b=base, a=base.clone()))
    assert weights_hash(holding(a=base.reshape(2, 3).T)) == weights_hash(holding(a=base.reshape(2, 3).T.contiguous()))


def test_the_quantized_layers_of_a_loaded_student_are_on_the_grid(student: nn.Module, saved: Path) -> None:
    loaded = load_student(saved, network(9))
    for layer in quantized_layers(loaded).values():
        assert isinstance(layer.weight, Tensor) and torch.equal(latent_weight(layer), layer.weight)
    assert {point: q.scale.tolist() for point, q in quantizers(loaded).items()} == {
        p: q.scale.tolist() for p, q in quantizers(student).items()
    }


def test_codes_of_a_large_layer_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rounding takes several floats a value on the way, so it never sees a whole layer: neither when saving nor when loading."""
    from datafree.quant import grid
    from datafree.quant import insert as inserting

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.ConvTranspose1d(6, 10, 3, groups=2)).eval()
    plan = Plan({"0": LayerPlan(QSpec(5, axis=0)), "1": LayerPlan(QSpec(4, symmetric=False, axis=1))})
    student = insert(model, plan)
    whole = {name: part.codes for name, part in freeze(student).items()}
    sizes: list[int] = []
    for name in ("quantize", "dequantize"):
        monkeypatch.setattr(inserting, name, counted(getattr(inserting, name), sizes))
    monkeypatch.setattr(grid, "_BLOCK", 100)
    save_student(student, tmp_path / "s.safetensors")
    loaded = load_student(tmp_path / "s.safetensors", model)
    assert all(torch.equal(part.codes, whole[name]) for name, part in freeze(loaded).items())
    assert torch.equal(loaded[0].weight, student[0].weight) and torch.equal(loaded[1].weight, student[1].weight)
    assert max(sizes) <= 100 and sum(sizes) == 3 * (2000 + 90)


def counted(function: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    def call(values: Tensor, *rest: object) -> Tensor:
        sizes.append(values.numel())
        return function(values, *rest)

    return call
