"""The student as a program of torch.export: float operations that round as the student does, for runtimes that read those."""

import io
from pathlib import Path

import torch
from torch import nn

from datafree.export.files import write_whole
from datafree.export.trace import exported
from datafree.quant.freeze import materialise
from datafree.task import Task


def export_program(student: nn.Module, task: Task, path: str | Path) -> Path:
    """Write ``student`` to ``path`` (.pt2), the batch dynamic, whole or not at all; ``torch.export.load`` reads it.

    Weights are stored as float32 values: the file is as large as the float network.

    Raises ExportError where torch.export cannot follow the network, OutputError where the file cannot be written.
    """
    program = exported(materialise(student).eval(), task)
    data = io.BytesIO()
    torch.export.save(program, data)
    return write_whole(path, data.getvalue())
