"""Slow float64 versions of error-feedback rounding and SQuant: one row, one column, one entry at a time."""

import torch
from torch import Tensor

from datafree.plan import QSpec

Place = tuple[int, int]


def nearest(value: float, scale: float, zero: float, spec: QSpec) -> int:
    """The code of one weight, half to even; DoReFa's zero lies between two codes."""
    code = round(value / scale + zero) if spec.grid == "dorefa" else round(value / scale) + round(zero)
    return min(max(code, spec.levels[0]), spec.levels[1])


def gptq(weight: Tensor, inverse: Tensor, order: list[int], scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """GPTQ (arXiv 2210.17323) for weight (out, n), given the inverse of H: after each column that is done, it leaves the inverse."""
    codes = torch.zeros(weight.shape, dtype=torch.int16)
    for row in range(weight.shape[0]):
        left, w = inverse.double().clone(), weight[row].double().clone()
        s, z = float(scale[row]), float(zero[row])
        for done, j in enumerate(order):
            codes[row, j] = nearest(float(w[j]), s, z, spec)
            error = (w[j] - s * (float(codes[row, j]) - z)) / left[j, j]
            for other in order[done + 1 :]:
                w[other] -= error * left[j, other]
            left = left - torch.outer(left[:, j], left[j]) / left[j, j]
    return codes


def falling(hessian: Tensor) -> list[int]:
    """Columns in the order in which they are rounded."""
    return [int(j) for j in hessian.diagonal().argsort(descending=True)]


def damped_inverse(hessian: Tensor, damping: float) -> Tensor:
    """The inverse of H plus ``damping`` times its mean diagonal."""
    h = hessian.double()
    inverse: Tensor = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    return inverse


def inverse_of_moments(mean: Tensor, var: Tensor) -> Tensor:
    """Sherman-Morrison: the inverse of diag(v) + m m^T."""
    m, v = mean.double(), var.double()
    return torch.diag(1 / v) - torch.outer(m / v, m / v) / (1 + float((m * m / v).sum()))


def squant(weight: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, stages: str = "ekc") -> tuple[Tensor, list[list[float]]]:
    """SQuant (arXiv 2202.07471) in loops over weight (out, in, taps): codes, and the sums of errors of each kernel after K."""
    outputs, inputs, taps = weight.shape
    codes = torch.zeros(weight.shape, dtype=torch.int16)
    after_k: list[list[float]] = []
    for o in range(outputs):
        t = {(i, p): float(weight[o, i, p] / scale[o] + zero[o]) for i in range(inputs) for p in range(taps)}
        q = {place: float(round(value)) for place, value in t.items()}
        up = [each for each in t if q[each] < t[each] < spec.levels[1]]
        down = [each for each in t if q[each] > t[each] > spec.levels[0]]
        if "k" in stages and taps > 1:
            next_up: list[Place] = []
            next_down: list[Place] = []
            for i in range(inputs):
                chosen = _kernel(t, q, [(i, p) for p in range(taps)], up, down)
                if chosen is not None:
                    (next_up if q[chosen] < t[chosen] else next_down).append(chosen)
            up, down = next_up, next_down
        after_k.append([sum(q[i, p] - t[i, p] for p in range(taps)) for i in range(inputs)])
        if "c" in stages:
            _flip(t, q, list(t), up, down)
        for place, value in q.items():
            codes[o, place[0], place[1]] = int(min(max(value, spec.levels[0]), spec.levels[1]))
    return codes, after_k


def _flip(t: dict[Place, float], q: dict[Place, float], row: list[Place], up: list[Place], down: list[Place]) -> tuple[list[Place], int]:
    """Flip what has to be; returns the queue it was taken from and how many."""
    total = sum(q[each] - t[each] for each in row)
    queue = sorted((each for each in (up if total < 0 else down) if each in row), key=lambda each: -abs(q[each] - t[each]))
    count = min(round(abs(total)), len(queue))
    for each in queue[:count]:
        q[each] += 1 if total < 0 else -1
    return queue, count


def _kernel(t: dict[Place, float], q: dict[Place, float], row: list[Place], up: list[Place], down: list[Place]) -> Place | None:
    """Stage K on one kernel; returns the one entry that may still be flipped."""
    total = sum(q[each] - t[each] for each in row)
    if total == 0:
        return None
    queue, count = _flip(t, q, row, up, down)
    if count >= abs(total):
        return queue[count - 1]
    return queue[count] if count < len(queue) else None
