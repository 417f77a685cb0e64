"""What the command line shows of a run."""

from dataclasses import replace

import torch
from torch import nn

import datafree
from datafree.show import NOTE_LENGTH, note_rows
from datafree.task import Task


def test_long_notes_are_shortened_but_what_stays_in_float_is_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    result = datafree.quantize(model, Task(shape=(3, 2, 2)), method="rtn", target=datafree.Target(4))
    floats = "layers that stay in float: " + "; ".join(f"blocks.{number}.attention: its weight is no parameter" for number in range(40))
    other = "pictures: " + "x" * 2 * NOTE_LENGTH
    told = [text for _, text in note_rows(replace(result, run={**result.run, "notes": [floats, other]}))]
    assert told[0] == floats and len(floats) > 4 * NOTE_LENGTH
    assert told[1] == f"{other[:NOTE_LENGTH]} ... (in full in run.json)"
