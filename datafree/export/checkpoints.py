"""Which state dict of a checkpoint fits a network, whatever the training program has put around it and before its names."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

from datafree.errors import WeightsError

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))  # parts of names, wherever they stand
_DEEPEST = 5  # dictionaries in dictionaries

State = Mapping[str, object]


@dataclass(frozen=True)
class LoadedWeights:
    """What was taken out of a file of weights.

    Args:
        file: its name.
        key: where in the file the state dict was, such as ``state_dict``, with dots between dictionaries; empty: the file itself.
        prefix: what was taken off before every name of the file, such as ``model.``.
        added: what was put before every name, where the network is a wrapper around the one that the file is of.
        dropped: names in the state dict that the network does not have.
        others: other state dicts in the file with weights of the network; they were not taken.
    """

    file: str
    key: str = ""
    prefix: str = ""
    added: str = ""
    dropped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """The above in words; empty where the file is the network's own state dict."""
        parts = [
            f"the state dict under {self.key!r}" if self.key else "",
            f"the prefix {self.prefix!r} of the names is taken off" if self.prefix else "",
            f"the prefix {self.added!r} is put before the names" if self.added else "",
            f"left out, for the network has no such names: {named(self.dropped)}" if self.dropped else "",
            f"not taken, though they hold weights of this network too: {named(self.others)}" if self.others else "",
        ]
        told = "; ".join(filter(None, parts))
        return f"weights from {self.file}: {told}" if told else ""


@dataclass(frozen=True)
class _Match:
    """A state dict of the file whose names, without ``prefix`` and behind ``added``, are names of the network."""

    key: str
    prefix: str
    added: str
    state: dict[str, object]  # by the names of the network
    dropped: tuple[str, ...]

    def missing(self, own: State) -> list[str]:
        return [key for key, value in own.items() if isinstance(value, Tensor) and key not in self.state and not _is_counter(key)]

    def misfits(self, own: State) -> list[str]:
        """Tensors of another shape or kind, in words."""
        found = []
        for key, value in self.state.items():
            mine = own[key]
            if not isinstance(mine, Tensor) or not isinstance(value, Tensor):
                continue
            if value.shape != mine.shape:
                found.append(f"{key} {tuple(value.shape)} instead of {tuple(mine.shape)}")
            elif mine.is_floating_point() and not value.is_floating_point():
                found.append(f"{key} of {value.dtype} instead of floats")
        return found


def find_state(data: object, model: nn.Module, file: str, weights_key: str | None = None) -> tuple[dict[str, object], LoadedWeights]:
    """The state dict in ``data``, what a file of weights holds, that fits ``model``, by the names of the network.

    Raises WeightsError where none fits, where several do and ``weights_key`` does not say which, or where the file is of a network with
    more blocks.
    """
    own = model.state_dict()
    states = {key: state for key, state in _states(data).items() if any(isinstance(value, Tensor) for value in state.values())}
    if not states:
        raise WeightsError(f"{file} holds no state dict, but {_described(data)}: save model.state_dict()")
    if weights_key is not None:
        states = _chosen(states, weights_key, file)
    matches = [match for key, state in states.items() for match in _matches(key, state, own)]
    fits = [match for match in matches if not match.missing(own) and not match.misfits(own)]
    exact = {match.key for match in fits if not match.prefix and not match.added}
    best = [match for match in fits if match.key not in exact or not match.prefix and not match.added]
    if not best:
        raise WeightsError(f"{file} does not fit the network: {_misfit(matches, states, own)}")
    if len(best) > 1:
        names = ", ".join(repr(_weights_key(match)) for match in best)
        raise WeightsError(
            f"{file} holds several state dicts that fit the network, under the keys {names}: choose one with --weights-key (weights_key=)"
        )
    match = best[0]
    _check_depth(match, model, file)
    others = tuple(_weights_key(each) for each in matches if each is not match and 2 * len(each.state) > len(own) and not each.misfits(own))
    return match.state, LoadedWeights(file, match.key, match.prefix, match.added, match.dropped, others)


def named(keys: Iterable[str]) -> str:
    """The first five of ``keys``, and how many more there are."""
    listed = list(keys)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return (", ".join(listed[:5]) or "none") + more


def _states(data: object, key: str = "", depth: int = 0) -> dict[str, State]:
    """Every dictionary in ``data`` by its path, the outermost first; entries that are not under a name are left out."""
    if not isinstance(data, Mapping) or depth > _DEEPEST:
        return {}
    entries = {name: value for name, value in data.items() if isinstance(name, str)}
    found: dict[str, State] = {key: entries}
    for name, value in entries.items():
        found |= _states(value, f"{key}.{name}" if key else name, depth + 1)
    return found


def _chosen(states: Mapping[str, State], weights_key: str, file: str) -> dict[str, State]:
    """The state dict at ``weights_key``, or the part of one whose names start with it."""
    if weights_key in states:
        return {weights_key: states[weights_key]}
    for key, state in states.items():
        prefix = (weights_key.removeprefix(f"{key}.") if key else weights_key).rstrip(".") + "."
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if part and (not key or weights_key.startswith(f"{key}.")):
            return {weights_key: part}
    keys = dict.fromkeys(filter(None, (*states, *(name.partition(".")[0] for name in states.get("", {}) if "." in name))))
    raise WeightsError(f"{file} holds nothing under the key {weights_key!r}; its keys are {named(keys)}")


def _matches(key: str, state: State, own: State) -> list[_Match]:
    """Ways to read ``state`` as the network's, those with the most of its names first; such as fit are preferred without ``added``."""
    plain = {_plain(name): name for name in own}
    theirs = {_plain(name): value for name, value in state.items()}
    found: list[_Match] = []
    for added in _common_prefixes(plain):
        wanted = {name.removeprefix(added): full for name, full in plain.items()}
        prefixes = Counter(prefix for name in theirs for prefix in _prefixes(name, wanted))
        for prefix, _ in prefixes.most_common():
            taken = {
                wanted[name.removeprefix(prefix)]: name
                for name in theirs
                if name.startswith(prefix) and name.removeprefix(prefix) in wanted
            }
            values = {
                full: theirs[name] for full, name in taken.items() if isinstance(theirs[name], Tensor) or full.endswith("_extra_state")
            }
            dropped = tuple(sorted(name for name, value in theirs.items() if isinstance(value, Tensor) and name not in taken.values()))
            match = _Match(key, prefix, added, values, dropped)
            found.append(match)
        if any(not match.missing(own) for match in found):
            break
    return found


def _plain(name: str) -> str:
    """The name without what torch.compile and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes that all of ``names`` share, the empty one first."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = [""]
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{shared[-1]}{parts[0]}.")
    return shared


def _prefixes(name: str, wanted: Mapping[str, str]) -> list[str]:
    """What may stand before a name of the network in ``name``."""
    parts = name.split(".")
    tails = ((index, ".".join(parts[index:])) for index in range(len(parts)))
    return [".".join((*parts[:index], "")) for index, tail in tails if tail in wanted]


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _weights_key(match: _Match) -> str:
    return ".".join(filter(None, (match.key, match.prefix.rstrip("."))))


def _misfit(matches: Sequence[_Match], states: Mapping[str, State], own: State) -> str:
    """What is missing or of another shape in the state dict that comes closest, and what to look at."""
    if not matches:
        largest = max(states.values(), key=len)
        return f"missing {_with_closest(list(own)[:5], largest)}; none of its {len(own)} names is in the file, which has {named(largest)}"
    closest = min(matches, key=lambda match: (len(match.missing(own)), len(match.misfits(own))))
    place = f" (in {_weights_key(closest)!r})" if _weights_key(closest) else ""
    missing, wrong = closest.missing(own), closest.misfits(own)
    if not missing:
        return f"wrong shapes{place}: {named(wrong)}; is it of a network with another width, or another number of classes?"
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return f"missing{place} {_with_closest(missing[:5], closest.dropped)}{more}; unexpected {named(closest.dropped)}"


def _with_closest(missing: Iterable[str], theirs: Iterable[str]) -> str:
    """Names that are missing, each with the closest name of the file."""
    names = list(theirs)
    told = []
    for key in missing:
        close = get_close_matches(key, names, n=1)
        told.append(f"{key} (closest: {close[0]})" if close else key)
    return ", ".join(told)


def _check_depth(match: _Match, model: nn.Module, file: str) -> None:
    """Names that go on counting where the network stops are of a deeper network, whose first blocks would compute something else."""
    modules = {_plain(name) for name, _ in model.named_modules()}
    counted = {name.rpartition(".")[0] for name in modules if name.rpartition(".")[2].isdigit()}
    blocks = set[str]()
    for name in match.dropped:
        parts = (match.added + name.removeprefix(match.prefix)).split(".") if name.startswith(match.prefix) else []
        for index in range(len(parts) - 1):
            parent, block = ".".join(parts[:index]), ".".join(parts[: index + 1])
            if parts[index].isdigit() and parent in counted and block not in modules:
                blocks.add(block)
    if blocks:
        raise WeightsError(
            f"{file} is of a deeper network: it has weights of {named(sorted(blocks))}, which this network does not have. Give the network "
            "that was trained, or take these weights out of the file if the network does without them"
        )


def _described(data: object) -> str:
    if isinstance(data, Mapping):
        name, value = next(iter(data.items()), (None, None))
        return "an empty dictionary" if not data else f"a dictionary with a {type(value).__name__} under {name!r}"
    return f"a {type(data).__name__}"
