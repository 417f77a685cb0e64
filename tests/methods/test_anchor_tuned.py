"""The closed form's student, trained on pictures with anchored statistics."""

import copy
import functools

import pytest
import torch
from torch import nn

import datafree
from datafree import Target
from datafree.context import Ctx
from datafree.graph.taps import anchored_alike
from datafree.methods import anchor_tuned
from datafree.quant.insert import latent_weight, quantized_layers, quantizers, weight_quantizer
from datafree.synth.noise import Pixels
from datafree.synth.noise import Recipe as Painting
from datafree.tune.taught import closed_student
from datafree.tune.terms import mse
from datafree.zoo.digits import digits
from networks import build, same

MODEL, TASK = digits()
TARGET = Target(2, 2, protocol="paper")
few_pictures = pytest.mark.usefixtures("few_pictures")
QUICK = {"steps": 3, "batch": 8, "pictures": 8, "picture_steps": 2, "warm_up": 2}


@functools.cache
def closed() -> nn.Module:
    return closed_student(MODEL, TASK, TARGET, Ctx.create(0))


@functools.cache
def quantized(**fields: object) -> nn.Module:
    """Begun from one closed form, which takes longer than these few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_tuned, "closed_student", lambda *args: copy.deepcopy(closed()))
        return datafree.methods()["anchor-tuned"](**QUICK | fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    painting = Painting(steps=30, rate=0.1, falling="cosine", batch=128, start="mix", per_image=False, share="layer")
    unseen, lost = Pixels(MODEL, TASK, Ctx.create(99), painting).sample(128).inputs, []
    for steps in (0, 40):
        chosen = datafree.methods()["anchor-tuned"](steps=steps, batch=32, pictures=128, picture_steps=30)
        student = chosen.run(MODEL, TASK, Target(3, 3, protocol="paper"), Ctx.create(0))
        with torch.no_grad(), anchored_alike(MODEL, student):
            lost.append(float(mse(MODEL(unseen), student(unseen))))
    assert lost[1] < 0.9 * lost[0]


@few_pictures
def test_weights_move_and_grids_stay() -> None:
    trained = quantized()
    for name, layer in quantized_layers(trained).items():
        other = closed().get_submodule(name)
        assert torch.equal(weight_quantizer(layer).scale, weight_quantizer(other).scale)
        assert not torch.equal(latent_weight(layer), latent_weight(other))
    ranges = quantizers(closed())
    assert all(torch.equal(each.scale, ranges[point].scale) for point, each in quantizers(trained).items())


@few_pictures
@pytest.mark.parametrize(
    "fields",
    (
        {"source": "procedural"},
        {"source": "mixed"},
        {"steps": 2},
        {"batch": 9},
        {"rate": 1e-2},
        {"norm_rate": 3e-2},
        {"budget": "fast"},
        {"source": "both"},
    ),
    ids=str,
)
def test_every_choice_counts(fields: dict[str, object]) -> None:
    assert same(quantized(), quantized(**fields)) == ("budget" in fields), "all that the budget fills in is given"


@few_pictures
def test_at_a_rate_of_nothing_weights_stay_while_norms_and_biases_learn() -> None:
    trained = quantized(rate=0.0)
    moved = {name for name, each in trained.named_parameters() if not torch.equal(each, closed().get_parameter(name))}
    assert moved and moved == {name for name, each in closed().named_parameters() if each.dim() == 1}


def test_large_pictures_leave_the_weights_alone() -> None:
    small, large = (datafree.methods()["anchor-tuned"](budget="fast")._setting(each) for each in (False, True))
    assert small.rate > 0 == large.rate and small.source == "distilled" and large.source == "both" and large.pictures < small.pictures


@few_pictures
def test_without_steps_it_is_the_student_of_anchor() -> None:
    tuned = datafree.methods()["anchor-tuned"](**QUICK | {"steps": 0}).run(MODEL, TASK, TARGET, Ctx.create(0))
    assert same(tuned, datafree.methods()["anchor"]().run(MODEL, TASK, TARGET, Ctx.create(0)))


@few_pictures
def test_without_batch_norms_it_is_the_student_of_anchor_as_a_note_says() -> None:
    model, task = build("transformer")
    target = Target(4, 4, protocol="paper")
    tuned, closed = (datafree.quantize(model, task, method=name, target=target) for name in ("anchor-tuned", "anchor"))
    assert same(tuned.student, closed.student)
    assert "the network has no batch norms" in str(tuned.run["notes"])


@few_pictures
def test_the_time_is_kept_and_told() -> None:
    chosen = datafree.methods()["anchor-tuned"](budget="standard", max_seconds=1.0, batch=8)
    run = datafree.quantize(MODEL, TASK, method=chosen, target=TARGET).run
    assert isinstance(run["seconds"], float) and run["seconds"] < 20
    assert "distill: stopped after" in str(run["notes"])
