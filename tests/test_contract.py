"""Every method on every tiny network: what each of them owes, whatever it does inside."""

import builtins
import io
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Plan, Target
from datafree.errors import NetworkError
from datafree.export.weights import save_student
from datafree.method import Method
from datafree.quant.freeze import materialise
from datafree.quant.insert import plan_of
from networks import NAMES, build

METHODS = tuple(datafree.methods())
torch.optim.SGD([torch.zeros(1)], 0.1)  # the first optimizer makes torch import its compiler, which opens files of the installation
# where a method has such fields: what it owes does not depend on them
FEWER = {"steps": 2, "warm_up": 2, "range_batches": 2, "batch": 4, "pictures": 8, "picture_steps": 2}
DEPLOYED = Target(4, 4, protocol="deploy")
OTHERS = (Target((2, 6), protocol="dfmpc"), Target(3, 3, protocol="paper"))
TARGETS = (*OTHERS, DEPLOYED)


def quick(name: str) -> Method:
    cls = datafree.methods()[name]
    return cls(**{each.name: FEWER[each.name] for each in fields(cls) if each.name in FEWER})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("network", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build(network)
    before, random = state(model), torch.get_rng_state()
    inputs = torch.randn(4, *task.shape, generator=torch.Generator().manual_seed(1))
    cls = datafree.methods()[method]
    monkeypatch.setattr(cls, "run", without_files(cls.run))
    for target in TARGETS:
        result = datafree.quantize(model, task, method=quick(method), target=target, seed=3)
        assert same(before, state(model)), "the network was changed"
        assert torch.equal(random, torch.get_rng_state()), "the method drew from the global generator"
        with torch.no_grad():
            answer = result.student(inputs)
            assert answer.shape == model(inputs).shape and torch.isfinite(answer).all()
            assert torch.equal(answer, materialise(result.student)(inputs)), "frozen and simulated differ"
        check_plan(result.plan, target)
        if target is not DEPLOYED:  # once is enough for what follows
            continue
        again = datafree.quantize(model, task, method=quick(method), target=target, seed=3)
        assert same(state(result.student), state(again.student)), "the same seed gave another student"
        folder = result.save(tmp_path / "run")
        loaded = datafree.load(folder, model)
        assert plan_of(loaded) == result.plan
        assert torch.equal(loaded(inputs), answer)
        save_student(loaded, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (folder / "student.safetensors").read_bytes()


def without_files(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def guarded(*args: object) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            for module in (builtins, io, os):
                patch.setattr(module, "open", lambda *args, **kwargs: pytest.fail(f"the method opened a file: {args}"))
            return run(*args)

    return guarded


def check_plan(plan: Plan, target: Target) -> None:
    assert plan.layers
    widths = {layer.weight.bits for layer in plan.layers.values()}
    assert widths <= set(target.widths) | ({8} if target.protocol == "deploy" else set())
    activations = {spec.bits for spec in (*(layer.input for layer in plan.layers.values()), *plan.tensors.values()) if spec}
    assert activations <= ({target.act_bits, 8} if target.protocol == "deploy" else {target.act_bits})
    assert bool(activations) == (target.act_bits is not None)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("network", NAMES)
def test_faithful_dfmpc_runs_or_refuses_clearly(network: str) -> None:
    model, task = build(network)
    method = datafree.methods()["dfmpc"](mode="faithful")
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        with pytest.raises(NetworkError, match="needs: use mode=.plus. or method .rtn."):
            datafree.quantize(model, task, method=method)
        return
    for target in TARGETS:
        assert datafree.quantize(model, task, method=method, target=target).run["fields"] == asdict(method)
