"""Files of weights as training programs leave them: taken where one reading fits, refused with a way on where none or several do."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datafree.cli import main
from datafree.errors import WeightsError
from datafree.export.float_weights import load_weights, weights_hash
from datafree.networks import load_network

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    return nn.ModuleDict({"body": body, "head": nn.Linear(4, 5)})


def before_all(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def adam(state: State) -> dict[str, object]:
    return {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


TAKEN: tuple[tuple[str, Callable[[State], object], str, str, tuple[str, ...]], ...] = (
    ("a.pth", lambda s: s, "", "", ()),
    ("a.bin", lambda s: s, "", "", ()),
    ("a.ckpt", lambda s: {"state_dict": before_all("model.", s), "hyper_parameters": {"lr": 0.1}}, "state_dict", "model.", ()),
    ("a.pth", lambda s: {"model": s, "optimizer": adam(s), "epoch": 3}, "model", "", ()),
    ("a.pth", lambda s: {"model": s, "args": Namespace(lr=0.1)}, "model", "", ()),
    ("a.pt", lambda s: {"model_state_dict": s, "loss": 0.3}, "model_state_dict", "", ()),
    ("a.pth", lambda s: {"params_ema": s}, "params_ema", "", ()),
    ("a.pth", lambda s: {"trainer": {"nets": {"ours": s}}}, "trainer.nets.ours", "", ()),
    ("a.pth", lambda s: before_all("module.", s), "", "module.", ()),
    ("a.pth", lambda s: before_all("module._orig_mod.", s), "", "module.", ()),
    ("a.pth", lambda s: before_all("encoder.net.", s), "", "encoder.net.", ()),
    ("a.pth", lambda s: {key.replace("body.", "body._orig_mod."): value for key, value in s.items()}, "", "", ()),
    ("a.pth", lambda s: {**s, "total_ops": torch.zeros(1), "body.1.total_ops": torch.zeros(1)}, "", "", ("body.1.total_ops", "total_ops")),
    ("a.pth", lambda s: {**before_all("net.", s), "loss.0.weight": torch.ones(2)}, "", "net.", ("loss.0.weight",)),
    ("a.pth", lambda s: {key: value for key, value in s.items() if "num_batches" not in key}, "", "", ()),
)


@pytest.mark.parametrize(("name", "wrap", "key", "prefix", "dropped"), TAKEN)
def test_a_checkpoint_is_taken(
    name: str, wrap: Callable[[State], object], key: str, prefix: str, dropped: tuple[str, ...], tmp_path: Path
) -> None:
    source, model = network(1), network(2)
    torch.save(wrap(source.state_dict()), tmp_path / name)
    loaded = load_weights(model, tmp_path / name)
    assert weights_hash(model) == weights_hash(source)
    assert (loaded.key, loaded.prefix, loaded.dropped) == (key, prefix, dropped)
    for part in filter(None, (key, prefix, *dropped)):
        assert part in loaded.note


def test_a_file_that_is_the_state_dict_needs_no_note(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert load_weights(network(), tmp_path / "w.pth").note == ""


def test_half_precision_is_taken_and_integers_are_not(tmp_path: Path) -> None:
    source, model = network(1), network(2)
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}, tmp_path / "w.pth"
    )
    load_weights(model, tmp_path / "w.pth")
    torch.testing.assert_close(model["head"].weight, source["head"].weight, rtol=1e-3, atol=1e-4)
    torch.save({**source.state_dict(), "head.weight": torch.ones(5, 4, dtype=torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="head.weight of torch.int8 instead of floats"):
        load_weights(model, tmp_path / "w.pth")


def test_a_wrapper_takes_the_file_of_the_network_inside(tmp_path: Path) -> None:
    source = network(1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    wrapper = nn.ModuleDict({"inner": network(2)})
    assert load_weights(wrapper, tmp_path / "w.pth").added == "inner."
    assert weights_hash(wrapper["inner"]) == weights_hash(source)


def test_one_of_several_state_dicts_has_to_be_chosen(tmp_path: Path) -> None:
    source, model = network(1), network(2)
    state, before = source.state_dict(), weights_hash(model)
    nested, flat = tmp_path / "nested.pth", tmp_path / "flat.safetensors"
    torch.save({"last": other(state), "average": {"net": before_all("module.", state)}}, nested)
    save_file({**before_all("last.", other(state)), **before_all("average.net.", state)}, flat)
    for file, key in ((nested, "average.net.module"), (flat, "average.net")):
        with pytest.raises(WeightsError, match=f"several state dicts .*('last', '{key}'|'{key}', 'last'): choose one with --weights-key"):
            load_weights(model, file)
        assert weights_hash(model) == before
        for choice in (key, "average.net"):
            chosen = network(3)
            load_weights(chosen, file, choice)
            assert weights_hash(chosen) == weights_hash(source)
    with pytest.raises(WeightsError, match="nothing under the key 'mean'; its keys are last, average"):
        load_weights(model, nested, "mean")


def test_an_average_without_norm_statistics_is_named(tmp_path: Path) -> None:
    state = network(1).state_dict()
    torch.save({"state_dict": state, "ema": {key: value for key, value in state.items() if "running" not in key}}, tmp_path / "w.pth")
    loaded = load_weights(network(2), tmp_path / "w.pth")
    assert (loaded.key, loaded.others) == ("state_dict", ("ema",)) and "not taken" in loaded.note and "ema" in loaded.note


def test_missing_names_are_told_with_the_closest(tmp_path: Path) -> None:
    state = network(1).state_dict()
    state["heads.weight"] = state.pop("head.weight")
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"missing \(in 'model'\) head.weight \(closest: heads.weight\); unexpected heads.weight"):
        load_weights(network(), tmp_path / "w.pth")


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    """Its first blocks have all the names and shapes of the network, as those of ResNet-34 have of ResNet-18."""
    torch.save({**network(1).state_dict(), "body.2.weight": torch.ones(4)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="of a deeper network: it has weights of body.2"):
        load_weights(network(), tmp_path / "w.pth")


def test_a_whole_module_and_a_scripted_one_are_refused_with_a_way_on(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match=r"torch.nn.modules.linear.Linear.*torch.save\(model.state_dict\(\)"):
        load_weights(nn.Linear(2, 2), tmp_path / "whole.pth")


# ---------------------------------------------------------------- on the command line

FILE = """
from torch import nn
from datafree import Task

def net():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(*layers).eval(), Task(shape=(3, 8, 8), classes=5)
"""


def test_what_was_taken_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    state = load_network("own.py:net").model.state_dict()
    torch.save({"state_dict": before_all("model.", {**state, "loss.weight": torch.ones(1)}), "ema": other(state)}, "w.ckpt")
    assert main(["inspect", "own.py:net", "--weights", "w.ckpt"]) == 2
    assert "--weights-key" in capsys.readouterr().err
    given = ["own.py:net", "--weights", "w.ckpt", "--weights-key", "state_dict"]
    for command in (["inspect", *given], ["quantize", *given, "--method", "rtn", "--weight-bits", "8", "--out", "run"]):
        assert main(command) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "the state dict under 'state_dict'" in told and "model.loss.weight" in told
    assert "model.loss.weight" in (tmp_path / "run" / "run.json").read_text()
    assert main(["inspect", "own.py:net", "--weights-key", "ema"]) == 2
    assert "no file is given: add --weights FILE" in " ".join(capsys.readouterr().err.split())
