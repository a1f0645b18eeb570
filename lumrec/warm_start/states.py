"""Optimizer state of a warm start: which parameter each entry belongs to, and what it means, on both sides.

FBGEMM's fused optimizers call their first state "<table>.momentum1", whatever it is: sums of squared gradients in
Adagrad, the mean gradient in Adam and LAMB. So an entry is read by what lies beside it and by its shape. State is taken
where both sides keep the same things; what is not taken is named in the audit.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from lumrec.run.distributed import gathered
from lumrec.run.errors import UserError
from lumrec.warm_start.rules import Rules, nearest
from lumrec.warm_start.sources import Source

# What each optimizer keeps: meaning → one number per "element" or per "row" of a table.
KEEPS = {
    "adagrad": {"sum": "element"},
    "rowwise_adagrad": {"sum": "row"},
    "adam": {"exp_avg": "element", "exp_avg_sq": "element"},
    "lamb": {"exp_avg": "element", "exp_avg_sq": "element"},
    "partial_rowwise_adam": {"exp_avg": "element", "exp_avg_sq": "row"},
    "partial_rowwise_lamb": {"exp_avg": "element", "exp_avg_sq": "row"},
    "sgd": {"momentum_buffer": "element"},
}
# Meaning of FBGEMM's momentum1 by the entries beside it; counters do not change it.
_MOMENTUM1 = {frozenset(): "sum", frozenset({"exp_avg_sq"}): "exp_avg"}
_COUNTERS = {"prev_iter", "row_counter", "iter"}
SQUARES = ("sum", "exp_avg_sq")  # never negative; the row-wise form is the mean of the element-wise one
# What wrappers put into names: DDP, DMP, FSDP, torch.compile.
_WRAPPERS = {"module", "_dmp_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}


class Dropped(ValueError):
    """Why a parameter's state is not taken."""


class Names:
    """Finds parameters by the names that optimizers give them."""

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters = frozenset(parameters)
        self.plain: dict[str, list[str]] = {}
        for name in parameters:
            self.plain.setdefault(plain(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The parameter that is called so: exactly, without what wrappers add, or also without the key that
        CombinedOptimizer puts in front. None for none, or several.
        """
        if name in self.parameters:
            return name
        for candidate in (plain(name), plain(name.partition(".")[2])):
            if len(found := self.plain.get(candidate, [])) == 1:
                return found[0]
        return None

    def split(self, rest: str) -> tuple[str | None, str]:
        """(parameter, entry) of "<parameter>.<entry>", both of which may have dots; the longest parameter that fits."""
        parts = rest.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if found := self.find(".".join(parts[:end])):
                return found, ".".join(parts[end:])
        return None, rest


def plain(name: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class Entry(NamedTuple):
    """One tensor of a parameter's state. tensor: None where another rank holds it, or of a source (then `name` is
    whole).
    """

    name: str
    size: tuple[int, ...]
    dtype: torch.dtype
    tensor: Any = None

    @property
    def last(self) -> str:
        return self.name.split(".")[-1]


class State(NamedTuple):
    """A parameter's state. entries: meaning → entry. forms: meaning → "element", "row", "scalar", "shard" (one number
    per row and column shard) or "". optimizer: its name, for messages.
    """

    entries: dict[str, Entry]
    forms: dict[str, str]
    optimizer: str


class SourceStates:
    """The state that a source holds, by parameter (the source's names without source_prefix)."""

    def __init__(self, source: Source, rules: Rules, parameters: Collection[str]) -> None:
        self.names = [n for n in source.tensors if rules.optimizer_prefix and n.startswith(rules.optimizer_prefix)]
        self.entries: dict[str, list[Entry]] = {}
        self.alias: dict[str, str] = {}  # what a state is saved under, where that is more than the parameter's name
        self.by_index = False
        names = Names(parameters)
        by_index = _names_by_index(source, rules, names)
        for name in self.names:
            rest = name.removeprefix(rules.optimizer_prefix)
            index, _, _ = rest.partition(".")
            if index.isdigit():
                owner = by_index.get(int(index))
                self.by_index |= owner is None
                found = names.find(owner) if owner else None
            else:
                found, entry = names.split(rest)
                if found and plain(saved := rest.removesuffix(f".{entry}")) != plain(found):
                    self.alias[found] = saved
            if found:
                stored = source.tensors[name]
                self.entries.setdefault(found, []).append(Entry(name, stored.size, stored.dtype))

    def of(self, parameter: str) -> list[Entry]:
        """The entries of a parameter. Raises Dropped where there are none, with the reason."""
        if parameter in self.entries:
            return self.entries[parameter]
        if self.by_index:
            raise Dropped(
                "the source keeps its state by index (0, 1, …), which does not say whose it is; give "
                "optimizer_parameters, the parameters' names in the optimizer's order"
            )
        raise Dropped("none in the source")


def _names_by_index(source: Source, rules: Rules, names: Names) -> dict[int, str]:
    """Index → parameter, as the rules say or as torch.optim saved it for an optimizer of named parameters.

    Raises UserError for rules that name other parameters than the source has.
    """
    if given := rules.optimizer_parameters:
        numbers = {
            int(index)
            for name in source.tensors
            if name.startswith(rules.optimizer_prefix)
            and (index := name.removeprefix(rules.optimizer_prefix).split(".")[0]).isdigit()
        }
        if not numbers:
            raise UserError("optimizer_parameters is given, but the source keeps its state by name: leave it out")
        if max(numbers) >= len(given):
            raise UserError(
                f"optimizer_parameters has {len(given)} names, but the source has state of a parameter {max(numbers)}"
            )
        for name in given:
            if names.find(name) is None:
                near = nearest(name, names.parameters)
                raise UserError(f"optimizer_parameters has {name!r}, which the source does not have{near}")
            if given.count(name) > 1:
                raise UserError(f"optimizer_parameters has {name!r} twice: give each parameter once")
        return dict(enumerate(given))
    groups = rules.optimizer_prefix.removesuffix("state.") + "param_groups."
    by_index: dict[int, str] = {}
    for key, place in source.values.items():
        owner = source.values.get(key.replace(".params.", ".param_names."))
        if key.startswith(groups) and ".params." in key and isinstance(place, int) and isinstance(owner, str):
            by_index[place] = owner
    return by_index


def read_state(entries: list[Entry], parameter: tuple[int, ...], *, kind: str = "") -> State:
    """What the entries of a parameter mean. kind: the optimizer that the rule states, "" for none.

    Raises Dropped where the meaning is not known, and UserError where the entries are not those of the rule's kind.
    """
    by_last: dict[str, Entry] = {}
    for entry in entries:
        if entry.last in by_last:
            raise Dropped(f"{entry.last} is there twice, {by_last[entry.last].name!r} and {entry.name!r}")
        by_last[entry.last] = entry
    others = by_last.keys() - _COUNTERS - {"momentum1", "step"}
    renamed = dict(by_last)
    if "momentum1" in by_last:
        if kind:
            first, *more = KEEPS[kind]
            meanings = {"momentum1": first, **({"momentum2": more[0]} if more else {})}
        elif (meaning := _MOMENTUM1.get(frozenset(others))) is not None:
            meanings = {"momentum1": meaning}
        else:
            raise Dropped(f"momentum1 beside {', '.join(sorted(others))} has no known meaning; say optimizer_kind")
        renamed = {meanings.get(last, last): entry for last, entry in by_last.items()}
    kept = {meaning: entry for meaning, entry in renamed.items() if meaning not in _COUNTERS}
    forms = {meaning: form_of(entry.size, parameter) for meaning, entry in kept.items()}
    if "step" in kept:
        forms["step"] = "scalar" if math.prod(kept["step"].size) == 1 else ""
    if kind:
        _check_kind(kind, kept, forms, parameter)
    return State(kept, forms, kind or _name_of(kept, forms))


def _check_kind(kind: str, entries: Mapping[str, Entry], forms: Mapping[str, str], parameter: tuple[int, ...]) -> None:
    shown = ", ".join(f"{entry.last} {list(entry.size)}" for entry in entries.values())
    same_form = all(
        forms.get(meaning) == form or form == "row" and forms.get(meaning) == "shard" or math.prod(parameter[1:]) == 1
        for meaning, form in KEEPS[kind].items()
    )
    if not same_form or entries.keys() - {"step"} != KEEPS[kind].keys():
        keeps = ", ".join(f"{meaning} per {form}" for meaning, form in KEEPS[kind].items())
        raise UserError(
            f"the rule says optimizer_kind={kind}, which keeps {keeps}; the source has {shown} for a parameter of "
            f"{list(parameter)}"
        )


def _name_of(entries: Mapping[str, Entry], forms: Mapping[str, str]) -> str:
    for name, keeps in KEEPS.items():
        if entries.keys() - {"step"} == keeps.keys() and all(
            forms[meaning] == form or form == "row" and forms[meaning] == "shard" for meaning, form in keeps.items()
        ):
            return name
    return "another optimizer"


def form_of(size: tuple[int, ...], parameter: tuple[int, ...]) -> str:
    """How an entry belongs to its parameter: "element", "row", "shard" (rows × column shards), "scalar", or "" """
    if size == parameter:
        return "element"
    if len(parameter) == 2:
        rows, columns = parameter
        if size in ((rows,), (rows, 1)):
            return "row"
        if len(size) == 1 and rows and size[0] % rows == 0 and 1 < size[0] // rows <= columns:
            return "shard"
    return "scalar" if math.prod(size) == 1 else ""


def matched(ours: State, theirs: State) -> list[str]:
    """Meanings that go from `theirs` to `ours`. Raises Dropped where the two keep different things."""
    # Adagrad's step count changes its learning rate only if that decays, and FBGEMM keeps none.
    needed = ours.entries.keys() - ({"step"} if "sum" in ours.entries else set())
    if ours.entries.keys() - {"step"} != theirs.entries.keys() - {"step"} or not needed <= theirs.entries.keys():
        raise Dropped(
            f"the source's is {theirs.optimizer} ({', '.join(sorted(theirs.entries))}), the model's "
            f"{ours.optimizer}, which needs {', '.join(sorted(needed))}"
        )
    return [meaning for meaning in ours.entries if meaning in theirs.entries]


def model_states(model: nn.Module, optimizer: Any, parameters: Collection[str]) -> dict[str, list[Entry]]:
    """Parameter → entries of the model's optimizer, equal in order on all ranks. Collective."""
    if optimizer is None:
        optimizer = getattr(model, "fused_optimizer", None)
    if optimizer is None:
        return {}
    if hasattr(optimizer, "state_tensors"):
        state = optimizer.state_tensors()
    elif isinstance(optimizer, KeyedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        state = optimizer.state_dict()["state"]
    else:  # torch's own counts its parameters in state_dict
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        state = {names.get(id(parameter), "?"): entries for parameter, entries in optimizer.state.items()}
    ours: dict[str, dict[str, Any]] = {}
    known_names = Names(parameters)
    for name, entries in state.items():
        if found := known_names.find(str(name)):
            ours[found] = {str(entry): value for entry, value in entries.items() if hasattr(value, "size")}
    sizes = {
        name: {entry: (tuple(value.size()), value.dtype) for entry, value in entries.items()}
        for name, entries in ours.items()
    }
    merged: dict[str, dict[str, Entry]] = {}
    for part in gathered(sizes):
        for name, known in part.items():
            for entry, (size, dtype) in known.items():
                merged.setdefault(name, {})[entry] = Entry(entry, size, dtype, ours.get(name, {}).get(entry))
    return {name: [merged[name][entry] for entry in sorted(merged[name])] for name in sorted(merged)}
