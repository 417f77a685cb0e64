"""Analytic bias correction: the mean of a layer's output does not move when its weights are quantized.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section 4.2.
"""

import torch
from torch import Tensor

from datafree.closed.moments import mean_form, row_blocks


def output_shift(quantized: Tensor, weight: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """How far quantization moves the mean of each output: sum of (quantized - weight)[j,c,p] m_c, (out,).

    quantized, weight: (out, in / groups, *kernel), the former with its scale; mean: means of the inputs, (in,).
    Raises NetworkError where sizes do not fit.
    """
    return torch.cat([mean_form(quantized[rows] - weight[rows], mean, groups) for rows in row_blocks(weight, groups)])


def corrected_bias(quantized: Tensor, weight: Tensor, mean: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """The bias that keeps the mean of each output where it was, (out,); ``bias`` is the layer's own, if it has one."""
    shift = output_shift(quantized, weight, mean, groups)
    return -shift if bias is None else bias - shift
