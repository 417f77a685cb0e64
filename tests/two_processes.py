"""What test_parallel.py starts twice beside itself with torchrun: each process writes down what it found, as RANK.json in a folder."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import datafree
from datafree import cli, parallel
from datafree import fit as loop
from datafree.bits.allocate import make_plan
from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.fit import fit
from datafree.graph.flow import read
from datafree.plan import QSpec
from datafree.quant.insert import insert
from datafree.synth.generator import Conditional
from datafree.synth.generator import Recipe as Generation
from datafree.synth.source import Batch
from datafree.tune.distill import Recipe, distill
from datafree.zoo.digits import digits

MODEL, TASK = digits()
QUICK = {"budget": "smoke", "warm_up": 1, "steps": 1, "batch": 4, "range_batches": 1, "generator": "light"}


class Killed(Exception):
    """Stands for the end of all processes."""


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.state_dict().values())).hexdigest()


def descend() -> dict[str, object]:
    """Every step, each process draws an aim of its own; one of two parameters has a gradient in the second process alone."""
    ctx, aims = Ctx.create(0), list[float]()
    x, y = torch.full((), float(parallel.rank()), requires_grad=True), torch.zeros((), requires_grad=True)

    def loss() -> Tensor:
        aims.append(float(torch.randn((), generator=ctx.generator)))
        return (x - aims[-1]).square() + (y if parallel.rank() else 0)

    losses = fit([x, y], loss, 3, torch.optim.SGD([x, y], lr=0.1), ctx, "descend")
    return {"aims": aims, "losses": losses, "x": x.item(), "y": y.item(), "next": float(torch.randn((), generator=ctx.generator))}


def blame() -> str:
    x = torch.ones((), requires_grad=True)
    try:
        fit([x], lambda: {"size": x, "shape": x / (1 - parallel.rank())}, 3, torch.optim.SGD([x], lr=0.1), Ctx.create(0), "descend")
    except MethodError as error:
        return str(error)
    return "nobody"


def learn(folder: Path | None, kill_at: int = 99) -> dict[str, object]:
    """A student and its generator: their bits, and the last inputs that were seen."""
    ctx = replace(Ctx.create(0), folder=folder)
    spec = lambda layer, bits: QSpec(bits, symmetric=False, axis=layer.out_axis)  # noqa: E731
    target = datafree.Target(4, 4, protocol="paper")
    student = insert(MODEL, make_plan(read(MODEL, TASK, ctx), MODEL, target, spec, ctx)).requires_grad_(False)
    source = Conditional(MODEL, TASK, ctx, Generation(batch=4, widths=(4, 4)))
    seen: list[Tensor] = []
    sample = source.sample

    def watched(n: int) -> Batch:
        if len(seen) == kill_at:
            raise Killed
        batch = sample(n)
        seen.append(batch.inputs)
        return batch

    source.sample = watched  # type: ignore[method-assign]
    recipe = Recipe(batch=4, range_batches=1, max_seconds=1000.0, hold_out=4)  # the clocks of the two differ, the rates must not
    losses = distill(MODEL, student, TASK, source, 4, ctx, recipe)
    return {"student": digest(student), "generator": digest(source.generator), "losses": losses, "inputs": float(seen[-1].abs().sum())}


def resume(folder: Path) -> dict[str, object]:
    loop.CHECKPOINT_STEPS = 2
    try:
        learn(folder, kill_at=5)
    except Killed:
        return learn(folder)
    raise AssertionError("it was not killed")


def quantized(folder: Path) -> dict[str, object]:
    told: list[str] = []
    method = datafree.methods()["gdfq"](**QUICK)
    result = datafree.quantize(MODEL, TASK, method=method, on_event=lambda event: told.append(event.name), folder=folder / "resume")
    return {"student": digest(result.student), "told": sorted(set(told)), "processes": result.run["processes"]}


def refused() -> str:
    try:
        datafree.quantize(MODEL, TASK, method="rtn")
    except MethodError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    flags = [text for name, value in QUICK.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    found: dict[str, object] = {"command": cli.main(["quantize", "digits", "--method", "gdfq", *flags, "--out", str(folder / "run")])}
    found |= {"descend": descend(), "blame": blame(), "learn": learn(None), "refused": refused()}
    found |= {"resumed": resume(folder / "checkpoints"), "quantized": quantized(folder)}
    (folder / f"{parallel.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
