"""Generators of every shape, blends of classes, the loss against float64 loops, and what an update may touch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from datafree.context import Ctx, Event
from datafree.errors import MethodError, NetworkError
from datafree.synth.generator import Added, Conditional, Convincing, Form, Generator, Look, Recipe
from datafree.synth.labels import Blend, one_class
from datafree.synth.terms import Gap
from datafree.task import Task
from datafree.zoo.digits import digits
from networks import build

MODEL, TASK = digits()
QUICK = Recipe(batch=8, widths=(8, 8))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(shape: tuple[int, ...], form: Form = "factor", added: Added | None = None, placed: bool = False) -> Generator:
    return Generator(shape, 5, form, Recipe(latent=6, widths=(8, 4), added=added, placed=placed), seeded())


def draw(generator: Generator, blend: Blend, seed: int = 1) -> Tensor:
    return generator(torch.randn(len(blend.classes), 6, generator=seeded(seed)), blend)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(each, other[name]) for name, each in one.items())


@pytest.mark.parametrize("form", ("factor", "norms", "unconditional"))
@pytest.mark.parametrize("shape", ((3, 32, 32), (1, 8, 12), (4, 32), (2, 4, 4, 8), (3, 15, 7)), ids=str)
def test_inputs_have_the_shape_and_every_channel_is_near_normal(shape: tuple[int, ...], form: Form) -> None:
    inputs = draw(made(shape, form), one_class(32, 5, seeded()))
    assert inputs.shape == (32, *shape)
    rows = inputs.movedim(1, 0).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(shape[0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(shape[0]), atol=0.02, rtol=0)


def test_an_input_without_spatial_axes_is_refused() -> None:
    with pytest.raises(NetworkError, match="1 to 3 spatial axes, not .*take a method without one"):
        made((16,))


@pytest.mark.parametrize(("form", "macs"), (("factor", 116), ("norms", 116)))
def test_multiplications_are_those_published(form: Form, macs: int) -> None:
    generator, count = Generator((3, 32, 32), 10, form, Recipe(), seeded()), 0

    def look(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal count
        assert isinstance(module.weight, Tensor)
        count += module.weight[0].numel() * result[0].numel()

    for each in generator.modules():
        if isinstance(each, nn.Linear | nn.Conv2d):
            each.register_forward_hook(look)
    generator(torch.randn(2, 100, generator=seeded()), one_class(2, 10, seeded()))
    assert round(count / 1e6) == macs


@pytest.mark.parametrize("form", ("factor", "norms"))
def test_the_class_tells(form: Form) -> None:
    generator = made((3, 8, 8), form)
    if form == "norms":  # which start alike for all classes
        nn.init.normal_(generator.norms[1].gain.weight, generator=seeded())  # type: ignore[arg-type,union-attr]
    one, other = (draw(generator, Blend(torch.full((4, 1), y), torch.ones(4, 1))) for y in (0, 1))
    assert not torch.allclose(one, other)


def test_without_classes_there_are_no_labels_and_none_tells() -> None:
    one, other = (draw(made((3, 8, 8), "unconditional"), Blend(torch.full((4, 1), y), torch.ones(4, 1))) for y in (0, 1))
    assert torch.equal(one, other)
    source = Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=8, widths=(8, 8), form="unconditional"))
    source.update(MODEL)
    fresh, another = source.sample(6), source.sample(6)
    assert fresh.labels is None and another.labels is None and fresh.answer is not None


@pytest.mark.parametrize("form", ("factor", "norms"))
def test_a_blend_of_equal_classes_is_that_class(form: Form) -> None:
    generator, classes = made((3, 8, 8), form), torch.tensor([[1], [2], [3]])
    blend = Blend(classes.repeat(1, 2), torch.tensor([0.3, 0.7]).repeat(3, 1))
    torch.testing.assert_close(draw(generator, blend), draw(generator, Blend(classes, torch.ones(3, 1))))


@pytest.mark.parametrize("form", ("factor", "norms"))
@pytest.mark.parametrize("mapped", (True, False))
def test_added_noise_of_the_same_class_and_slot_superposes_to_itself(form: Form, mapped: bool) -> None:
    generator = made((3, 8, 8), form, added=Added(7, mapped=mapped))
    for each in generator.norms:
        if each.gain is not None:  # type: ignore[union-attr]
            nn.init.normal_(each.gain.weight, generator=seeded())  # type: ignore[arg-type,union-attr]
    assert generator.linear.in_features == (6 if mapped else 7)
    classes = torch.tensor([[1], [2], [3]])
    z = generator.noise(Blend(classes, torch.ones(3, 1)), seeded())
    assert z.shape == (3, 1, 7)
    blend = Blend(classes.repeat(1, 2), torch.tensor([0.3, 0.7]).repeat(3, 1))
    assert generator.noise(blend, seeded()).shape == (3, 2, 7)
    torch.testing.assert_close(generator(z.repeat(1, 2, 1), blend), generator(z, Blend(classes, torch.ones(3, 1))), atol=1e-4, rtol=1e-4)


def test_what_is_superposed_is_standardised_each_by_itself() -> None:
    generator = made((3, 8, 8), added=Added(50, mapped=False))
    blend = one_class(4, 5, seeded())
    code = generator._code(10 * generator.noise(blend, seeded()), blend)
    torch.testing.assert_close(code.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(code.var(1, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_divided_gains_and_biases_are_smaller_by_the_number_of_slots() -> None:
    plain, divided = (made((3, 8, 8), "norms", added=Added(7, divided=divided)) for divided in (False, True))
    x, classes = torch.randn(3, 8, 4, 4, generator=seeded()), torch.tensor([[0, 1], [2, 2], [4, 3]])
    for table in (plain.norms[0].gain, plain.norms[0].bias):
        nn.init.normal_(table.weight, generator=seeded())  # type: ignore[arg-type,union-attr]
    divided.load_state_dict(plain.state_dict())
    blend = Blend(classes, torch.tensor([[0.3, 0.7]]).repeat(3, 1))
    torch.testing.assert_close(divided.norms[0](x, blend), plain.norms[0](x, blend) / 2)
    table = plain.norms[0].gain.weight  # type: ignore[union-attr]
    wanted = 0.3 * table[0] + 0.7 * table[1]  # type: ignore[index]
    found = plain.norms[0](x, blend) - plain.norms[0](torch.zeros_like(x), blend)
    torch.testing.assert_close(found[0], plain.norms[0].norm(x)[0] * wanted[:, None, None])  # type: ignore[operator,union-attr]


def test_embeddings_start_as_they_are_given() -> None:
    start = torch.randn(5, 7, generator=seeded())
    generator = made((3, 8, 8), added=Added(7, start=start))
    assert generator.embedding is not None and torch.equal(generator.embedding.weight, start)
    assert generator.embedding.weight.data_ptr() != start.data_ptr()


@pytest.mark.parametrize("form", ("factor", "norms"))
def test_the_place_tells(form: Form) -> None:
    generator, one = made((3, 8, 8), form, placed=True), one_class(4, 5, seeded())
    here, there = (draw(generator, Blend(one.classes, one.shares, torch.full((4, 2), at))) for at in (0.2, 0.8))
    assert not torch.allclose(here, there)


def test_an_objective_sees_the_features_it_asks_for_and_what_they_were_made_from() -> None:
    model, task = build("resnet_basic")
    source = Conditional(model, task, Ctx.create(0), Recipe(batch=4, widths=(8, 8), features="maxpool"))
    look = source._look()
    assert look.features is not None and look.blend is not None and look.noise is not None
    kept = source.teacher
    with torch.no_grad():
        expected = kept.maxpool(kept.relu(kept.bn1(kept.conv1(look.inputs))))  # type: ignore[operator,union-attr]
        torch.testing.assert_close(look.features, expected)
        torch.testing.assert_close(look.inputs, source.generator(look.noise, look.blend))
    assert look.features.requires_grad and torch.equal(look.labels, look.blend.labels(5))
    assert not any(each._forward_hooks for each in source.teacher.modules())


def test_the_loss_is_the_published_codes() -> None:
    answer, labels = torch.randn(4, 3, generator=seeded()), torch.tensor([0, 2, 1, 1])
    found = [Gap(torch.randn(1, width, generator=seeded(width)), torch.randn(1, width, generator=seeded(9 + width))) for width in (2, 5)]
    terms = Convincing(statistics=0.1)(Look(torch.empty(0), labels, answer, found), nn.Identity())
    by_layer = [(sum(x * x for x in gap.mean[0].tolist()) + sum(x * x for x in gap.spread[0].tolist())) / gap.mean.numel() for gap in found]
    assert terms["bn_statistics"].item() == pytest.approx(0.1 * sum(by_layer) / 2, rel=1e-5)
    assert terms["cross-entropy"].item() == pytest.approx(-answer.double().log_softmax(1)[range(4), labels].mean().item(), rel=1e-5)


def test_statistics_are_those_that_enter_a_norm_with_the_biased_variance() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    source = Conditional(model, Task(shape=(2, 4, 4)), Ctx.create(0), QUICK)
    look = source._look()
    (gap,) = look.found
    rows = look.inputs.movedim(1, 0).flatten(1)
    torch.testing.assert_close(gap.mean[0], rows.mean(1))
    torch.testing.assert_close(gap.spread[0], rows.var(1, correction=0) - 1)


def test_a_generator_learns_what_it_is_asked() -> None:
    source = Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=32, widths=(16, 16), rate=5e-3))
    losses = source.learn(60, MODEL)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    batch = source.sample(1000)
    assert batch.labels is not None and (MODEL(batch.inputs).argmax(1) == batch.labels).float().mean() > 0.13, "chance is 0.1 +- 0.01"


def test_an_update_changes_the_generator_alone_and_its_batch_is_given_once() -> None:
    source = Conditional(MODEL, TASK, Ctx.create(0), QUICK)
    teacher, before = state(MODEL), state(source.generator)
    terms = source.update(MODEL)
    assert list(terms) == ["cross-entropy", "bn_statistics"] and not any(each.requires_grad for each in terms.values())
    assert same(teacher, state(MODEL)) and not any(each._forward_pre_hooks for each in source.teacher.modules())
    assert all(not torch.equal(each, before[name]) for name, each in source.generator.state_dict().items() if "bias" not in name)
    first, second = source.sample(6), source.sample(6)
    assert first.answer is not None and second.answer is None and not torch.equal(first.inputs, second.inputs)
    with torch.no_grad():
        torch.testing.assert_close(first.answer, MODEL(first.inputs))
    source.update(MODEL)
    assert source.sample(9).answer is None and source.sample(2).answer is None, "more than the last update had, and then its rest"


def test_an_objective_may_look_through_the_student_which_keeps_no_gradient() -> None:
    student = build("vgg")[0].requires_grad_()
    model, task = build("cifar_resnet")

    def apart(look: Look, student: nn.Module) -> dict[str, Tensor]:
        return {"agreement": (student(look.inputs) * look.answer.detach()).mean()}

    source = Conditional(model, task, Ctx.create(0), Recipe(batch=4, widths=(8, 8), objective=apart))
    before = state(source.generator)
    source.update(student)
    assert not same(before, state(source.generator)) and all(each.grad is None for each in student.parameters())


def test_a_loss_that_is_no_number_is_named_and_the_generator_stays() -> None:
    source = Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=8, widths=(8, 8), objective=Convincing(statistics=float("nan"))))
    before = state(source.generator)
    with pytest.raises(MethodError, match="generator: the bn_statistics is nan at step 1: lower the learning rate"):
        source.update(MODEL)
    with pytest.raises(MethodError, match="generator: the bn_statistics is nan at step 1: lower the learning rate"):
        source.learn(3, MODEL)
    assert same(before, state(source.generator))


def test_its_state_is_all_that_it_learns_with() -> None:
    recipe = Recipe(batch=8, widths=(8, 8), milestones=(3,))
    source, ctx = Conditional(MODEL, TASK, Ctx.create(0), recipe), Ctx.create(0)
    for _ in range(2):
        source.update(MODEL)
    kept, random = copy.deepcopy(source.state_dict()), source.ctx.generator.get_state()
    other = Conditional(MODEL, TASK, ctx, recipe)
    other.load_state_dict(kept)  # type: ignore[arg-type]
    ctx.generator.set_state(random)
    for each in (source, other):
        for _ in range(3):
            each.update(MODEL)
    assert same(state(source.generator), state(other.generator)) and source.schedule.get_last_lr() == [1e-4]


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (Conditional(MODEL, TASK, Ctx.create(seed), QUICK).sample(4).inputs for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(before, torch.get_rng_state())


def test_without_norms_the_classes_teach_and_a_note_says_so() -> None:
    notes: list[Event] = []
    model, task = build("without_norm")
    source = Conditional(model, task, Ctx.create(0, on_event=notes.append), QUICK)
    assert list(source.update(model)) == ["cross-entropy"]
    assert ["it learns without them" in each.message for each in notes] == [True]


def test_without_logits_there_is_nothing_to_ask_for() -> None:
    with pytest.raises(NetworkError, match="pictures of classes need .*take a method that knows none"):
        Conditional(nn.Sequential(*MODEL.children())[:3], TASK, Ctx.create(0), QUICK)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(NetworkError, match="0 inputs were asked for"):
        Conditional(MODEL, TASK, Ctx.create(0), QUICK).sample(0)
