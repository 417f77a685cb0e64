"""Each term against loops in float64; the hooks against the network's own list of batch norms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.synth.terms import (
    Gap,
    by_depth,
    by_turns,
    certainty_gap,
    class_entropy,
    cosine_margin,
    entering,
    entropy,
    gaps,
    image_prior,
    margins_of,
    moments,
    norm_moments,
    over_batch,
    statistics,
    stored_moments,
    total_variation,
)
from networks import NAMES, Scripted, build, conv_bn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 2, 7), (2, 3, 2, 3, 4)], ids=str)
def test_moments_agree_with_float64_and_so_does_their_slope(shape: tuple[int, ...]) -> None:
    x = (3 + 2 * normal(*shape)).requires_grad_()
    mean, var = moments(x)
    exact = x.detach().double().requires_grad_()
    expected = exact.flatten(2).mean(2), exact.flatten(2).var(2, correction=0)
    torch.testing.assert_close((mean.double(), var.double()), expected, rtol=1e-5, atol=1e-5)
    weights = normal(*mean.shape, seed=1), normal(*mean.shape, seed=2)
    sum((w * m.sin()).sum() for w, m in zip(weights, (mean, var), strict=True)).backward()
    sum((w.double() * m.sin()).sum() for w, m in zip(weights, expected, strict=True)).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_a_small_variance_far_from_zero_does_not_cancel() -> None:
    x = (30 + 0.01 * normal(4, 3, 32, 32)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    var, expected = moments(x)[1], exact.flatten(2).var(2, correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-4, atol=0)
    var.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-3 * float(exact.grad.abs().max()))


def test_statistics_of_a_batch_from_those_of_its_inputs() -> None:
    x = normal(4, 3, 5, 5) + normal(4, 3, 1, 1, seed=1)
    mean, var = over_batch(moments(x))
    rows = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close((mean[0].double(), var[0].double()), (rows.mean(1), rows.var(1, correction=0)), rtol=1e-5, atol=1e-6)
    for flat in (normal(6, 3), normal(6, 3, 1, 1)):  # an input of one position has no variance of its own
        mean, var = moments(flat)
        torch.testing.assert_close((mean[0], var[0]), (flat.flatten(1).mean(0), flat.flatten(1).var(0, correction=0)))


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_norm_is_watched_and_let_go(name: str) -> None:
    model, task = build(name)
    norms = [each for each, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert list(stored_moments(model)) == norms
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with norm_moments(model) as seen, torch.no_grad():
        model(normal(2, *task.shape))
    assert sorted(seen) == sorted(norms)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_what_enters_the_norm_is_watched_not_what_a_convolution_gives() -> None:
    """Pre-activation, a convolution without a norm, and a norm called with its input by keyword."""
    conv, norm = conv_bn(3, 4)
    model = Scripted(lambda self, x: self.second(input=self.extra(self.conv(F.relu(self.norm(x))))), norm=nn.BatchNorm2d(3), conv=conv,
                     extra=nn.Conv2d(4, 4, 1), second=norm).eval()  # fmt: skip
    x = normal(2, 3, 6, 6)
    with norm_moments(model) as seen, torch.no_grad():
        model(x)
        inner = model.extra(model.conv(F.relu(model.norm(x))))
    torch.testing.assert_close(seen["norm"][0], moments(x))
    torch.testing.assert_close(seen["second"][0], moments(inner))


def test_a_norm_that_is_called_twice_has_the_mean_of_its_calls() -> None:
    first, second = moments(normal(2, 3, 4, 4)), moments(normal(2, 3, 4, 4, seed=1))
    (gap,) = gaps({"a": [first, second]}, {"a": (torch.zeros(3), torch.ones(3))}, per_image=True, spread="variance")
    torch.testing.assert_close(gap.mean, (first[0] + second[0]) / 2)
    torch.testing.assert_close(gap.spread, (first[1] + second[1]) / 2 - 1)


@pytest.mark.parametrize("spread", ["deviation", "variance"])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("share", ["channel", "layer"])
@pytest.mark.parametrize("weighted", ["flat", "slack", "turns", "depth"])
def test_statistics_agree_with_loops(weighted: str, share: str, per_image: bool, spread: str) -> None:
    n, widths = 4, (2, 3, 5, 6, 4)
    values = {str(i): normal(n, c, 6, 5, seed=i) for i, c in enumerate(widths)}
    stored = {str(i): (normal(c, seed=10 + i) / 3, normal(c, seed=20 + i).square()) for i, c in enumerate(widths)}
    found = gaps({name: [moments(x)] for name, x in values.items()}, stored, per_image, spread)
    margins = [(0.1 * i, 0.05 * i) for i in range(5)] if weighted == "slack" else None
    rows = n if per_image else 1
    weight = {"turns": by_turns(rows, 5), "depth": by_depth(5)}.get(weighted)
    total = counted = 0.0
    for i, (name, x) in enumerate(values.items()):
        for j in range(rows):
            part = 0.0
            for c in range(widths[i]):
                seen = (x[j, c] if per_image else x[:, c]).double()
                spreads = [float(seen.var(correction=0)), float(stored[name][1][c])]
                if spread == "deviation":
                    spreads = [math.sqrt(each + 1e-6) for each in spreads]
                away = abs(float(seen.mean()) - float(stored[name][0][c])), abs(spreads[0] - spreads[1])
                part += sum(max(0.0, each - margin) ** 2 for each, margin in zip(away, margins[i] if margins else (0, 0), strict=True))
            # over five layers, 1 + 1 / 5 and (1 * .2 + 4 * 1.1) / 5 bring the weights to mean 1
            gain = {"turns": (2 if j % 5 == i else 1) / 1.2, "depth": (0.2 if i < 1 else 1.1) / 0.92}.get(weighted, 1.0)
            total += gain * (part if share == "channel" else part / widths[i])
    counted = rows * (sum(widths) if share == "channel" else 5)
    assert float(statistics(found, share, margins, weight)) == pytest.approx(total / counted, rel=1e-4)


def test_inputs_of_exactly_the_stored_statistics_cost_nothing() -> None:
    conv, norm = conv_bn(3, 4)
    x = normal(1, 3, 8, 8)
    model = nn.Sequential(conv, norm).eval()
    with torch.no_grad(), norm_moments(model) as seen:
        mean, var = moments(conv(x))
        norm.running_mean.copy_(mean[0])
        norm.running_var.copy_(var[0])
        model(x.expand(5, 3, 8, 8))
    for per_image in (True, False):
        assert float(statistics(gaps(seen, stored_moments(model), per_image))) < 1e-10


def test_the_term_does_not_grow_with_batch_width_or_depth() -> None:
    gap = Gap(torch.full((2, 3), 0.5), torch.full((2, 3), 0.5))
    wide = Gap(torch.full((7, 30), 0.5), torch.full((7, 30), 0.5))
    for share in ("channel", "layer"):
        assert float(statistics([gap], share)) == float(statistics([wide] * 4, share)) == 0.5
        assert float(statistics([wide] * 4, share, weight=by_turns(7, 4))) == pytest.approx(0.5)
    shared = Gap(torch.full((1, 3), 0.5), torch.full((1, 3), 0.5))  # a layer that has statistics of the batch only
    assert float(statistics([wide, shared])) == pytest.approx(0.5)


def test_margins_hold_for_so_many_percent() -> None:
    gap = Gap(normal(100, 10), 2 * normal(100, 10, seed=1))
    ((of_mean, of_spread),) = margins_of([gap], 90)
    assert float((gap.mean.abs() <= of_mean).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert float((gap.spread.abs() <= of_spread).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_entropies_agree_with_loops() -> None:
    answer, labels = 3 * normal(5, 4), torch.tensor([0, 3, 1, 1, 2])
    cross = undecided = 0.0
    for row, label in zip(answer.double().tolist(), labels.tolist(), strict=True):
        total = sum(map(math.exp, row))
        shares = [math.exp(each) / total for each in row]
        cross -= math.log(shares[label]) / 5
        undecided -= sum(share * math.log(share) for share in shares) / 5
    assert float(class_entropy(answer, labels)) == pytest.approx(cross, rel=1e-5)
    assert float(entropy(answer)) == pytest.approx(undecided, rel=1e-5)
    for term in (entropy, lambda x: class_entropy(x, labels)):
        with pytest.raises(NetworkError, match="answers \\(5, 1\\).*leave the classes out"):
            term(answer[:, :1])


def test_a_focus_weighs_by_hardness_and_bears_certainty() -> None:
    answer, labels = 3 * normal(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    p = answer.double().softmax(1).gather(1, labels[:, None])[:, 0]
    for focus in (0.5, 2.0):
        assert float(class_entropy(answer, labels, focus)) == pytest.approx(float(-((1 - p) ** focus * p.log()).mean()), rel=1e-5)
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    class_entropy(certain, torch.tensor([0]), 0.5).backward()
    assert certain.grad is not None and torch.isfinite(certain.grad).all()


def test_probabilities_are_asked_for() -> None:
    answer, labels = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([0, 1])
    assert float(certainty_gap(answer, labels, torch.tensor([0.5, 0.75]))) == pytest.approx(0, abs=1e-12)
    assert float(certainty_gap(answer, labels, torch.tensor([1.0, 0.75]))) == pytest.approx(0.125)


def test_features_keep_within_the_margin() -> None:
    features = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    centres = torch.tensor([[5.0, 0.0]] * 3 + [[0.0, 0.0]])  # the last of no feature yet
    far = 1 - math.sqrt(0.5)
    assert float(cosine_margin(features, centres, 0.1, 0.8)) == pytest.approx((0.1 + 0 + 0.2 + 0) / 4, abs=1e-6)
    assert float(cosine_margin(features, centres, 0.0, far)) == pytest.approx((1 - far) / 4, abs=1e-6)
    assert float(cosine_margin(features, centres, 0.0, 2.0)) == 0


def test_what_enters_a_layer_is_averaged_over_positions() -> None:
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(5, 2)
    x, tokens = normal(2, 3, 6, 5), normal(2, 7, 5)
    with entering(nn.Sequential(conv), "0") as seen:
        conv(x)
    assert torch.allclose(seen[0], x.mean((2, 3)))
    with entering(nn.Sequential(linear), "0") as seen, entering(linear, None) as nothing:
        linear(tokens), linear(tokens[:, 0])
    assert torch.allclose(seen[0], tokens.mean(1)) and seen[1].equal(tokens[:, 0]) and not nothing
    assert not conv._forward_pre_hooks and not linear._forward_pre_hooks


def test_total_variation_and_prior_agree_with_loops() -> None:
    x = normal(2, 3, 4, 5)
    down = [float(x[n, c, i + 1, j] - x[n, c, i, j]) ** 2 for n in range(2) for c in range(3) for i in range(3) for j in range(5)]
    across = [float(x[n, c, i, j + 1] - x[n, c, i, j]) ** 2 for n in range(2) for c in range(3) for i in range(4) for j in range(4)]
    expected = (sum(down) / len(down) + sum(across) / len(across)) / 2
    assert float(total_variation(x)) == pytest.approx(expected, rel=1e-5)
    assert float(image_prior(x)) == pytest.approx(expected + float(x.double().square().mean()), rel=1e-5)
    assert float(total_variation(normal(4, 3))) == float(total_variation(torch.ones(2, 3, 4, 4))) == 0
