"""How far a student's answers are from its teacher's: each distance is a function of the logits that gives a scalar.

One normalisation for all: the mean over the inputs, so that a weight means the same for every size of batch. What is a sum over the
classes by definition (a divergence, an entropy) stays one; differences of logits are averaged over the classes too.

Legend: t logits of the teacher, s logits of the student, (n, classes); T temperature.
"""

import torch.nn.functional as F
from torch import Tensor

from datafree.synth.terms import entropies


def kl(t: Tensor, s: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` in nats (Hinton et al., arXiv 1503.02531): gradients keep their size at any T.

    Codes that call theirs ``mean`` or weigh it anew mean another multiple of it: that of GDFQ is 1 / classes times this one.
    """
    teacher, student = ((each.float() / temperature).log_softmax(1) for each in (t, s))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def mse(t: Tensor, s: Tensor) -> Tensor:
    """Mean squared difference of the logits."""
    return F.mse_loss(s.float(), t.float())


def l1(t: Tensor, s: Tensor) -> Tensor:
    """Mean absolute difference of the logits."""
    return F.l1_loss(s.float(), t.float())


def adaptability(t: Tensor, s: Tensor, temperature: float = 1.0) -> Tensor:
    """``-T^2 H(softmax((t - s) / T))``, AdaDFQ's loss of the student (CVPR 2023): least, ``-T^2 log(classes)``, where t - s is constant."""
    return -(temperature**2) * entropies((t.float() - s.float()) / temperature).mean()
