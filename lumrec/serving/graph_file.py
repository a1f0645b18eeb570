"""An exported graph as a file (.pt2): written by torch, and read here so that nothing in it is executed or unpickled.

torch.export.load is made for files that one trusts: of a .pt2 it unpickles example inputs, objects and some weights, it
hands expressions of sizes to SymPy, which evaluates them as Python, it executes guards as Python, and a node may name
any function of torch. It also loads torch's compilers, which takes seconds, and checks all sizes again at each call,
which takes most of the time of a small graph.

A graph of ours is a list of calls of operators (torch.ops.aten and arithmetic of sizes) on inputs, weights and results
of earlier calls. `read_graph` makes one Python function of it. The function's text has only names that are numbered
here; what the file says are the operators, all of an allow-list, and constants that are passed to them::

    nodes of models/model.json                                    the function
    mul: aten.mul.Tensor(self=x, other=2)                         v2 = f[0](v0, c[0])
    getitem, getitem_1: aten.split_with_sizes.default(mul, …)     v3, v4, = f[1](v2, c[1]); v2 = None

What an attacker may still do is to give other scores, or to read memory by an operator that does not check its input:
a bundle from someone else is to be compared with the SHA-256 that its maker gives (see docs/security.md).
"""

from __future__ import annotations

import json
import operator
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lumrec.run.errors import UserError

Json = dict[str, Any]
# Numbers of types in the format (torch._export.serde.schema.ScalarType), as far as rankers have them.
_DTYPES = {
    **{1: torch.uint8, 2: torch.int8, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32},
    **{8: torch.float64, 12: torch.bool, 13: torch.bfloat16},
}
_OF_SIZES = ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_REFUSED = ("from_file",)  # reads and writes files
_DAMAGED = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile)
_PLAIN = ("as_bool", "as_int", "as_float", "as_string", "as_bools", "as_ints", "as_floats", "as_strings")


def save_graph(program: ExportedProgram, path: Path) -> None:
    """Writes a graph without example inputs (they would hold the tables) and without paths of this machine.

    Raises UserError where it has something that `read_graph` refuses.
    """
    program._example_inputs = None
    program._guards_code = []
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for name in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node"):
                node.meta.pop(name, None)
    torch.export.save(program, path)
    read_graph(path)


def read_graph(path: Path) -> Callable[..., Any]:
    """The graph that `save_graph` wrote, as a function of the arguments that the exported module had.

    Raises UserError for any other file, before anything in it is used.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            module = json.loads(archive.read(f"{root}/models/model.json"))["graph_module"]
            weights = _weights(archive, f"{root}/data/weights/") | _weights(archive, f"{root}/data/constants/")
        own = [_own_weight(spec, weights) for spec in module["signature"]["input_specs"]]
        keys = _keys(module["module_call_graph"][0]["signature"]["in_spec"])
        run = partial(_function(module["graph"]), *(weight for weight in own if weight is not None))
    except _DAMAGED as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no graph that lumrec exported ({said:.200}): export it again") from None

    def call(*arguments: Any) -> Any:
        inputs = zip(arguments, keys, strict=True)
        return run(*(x for given, of in inputs for x in ([given] if of is None else [given[key] for key in of])))

    return call


def _weights(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    """The weights in a folder of the archive, by name: files whose bytes are their numbers."""
    kind = Path(folder).name
    weights = {}
    for name, facts in json.loads(archive.read(f"{folder}model_{kind}_config.json"))["config"].items():
        if facts["use_pickle"]:
            raise ValueError("it holds pickled weights")
        meta = facts["tensor_meta"]
        size, stride = ([each["as_int"] for each in meta[of]] for of in ("sizes", "strides"))
        content = bytearray(archive.read(folder + facts["path_name"])) or bytearray(8)
        numbers = torch.frombuffer(content, dtype=_DTYPES[meta["dtype"]])
        weights[name] = torch.as_strided(numbers, size, stride, meta["storage_offset"]["as_int"]).clone()
    return weights


def _own_weight(spec: Json, weights: dict[str, Tensor]) -> Tensor | None:
    """The weight that an input of the graph stands for; None where it is given in each call, as all later ones are."""
    ((kind, of),) = spec.items()
    return None if kind == "user_input" else weights[of[f"{kind}_name"]]


def _keys(in_spec: str) -> list[list[str] | None]:
    """Of each argument: its keys in the order of the graph's inputs, or None for a tensor."""
    arguments = json.loads(in_spec)[1]["children_spec"][0]["children_spec"]
    return [None if each["type"] is None else json.loads(each["context"]) for each in arguments]


def _function(graph: Json) -> Callable[..., Any]:
    """The graph as a function of its inputs: a result, or a tuple of several."""
    variables: dict[str, str] = {}
    functions: list[Callable] = []
    constants: list[Any] = []

    def new(name: str) -> str:
        return variables.setdefault(name, f"v{len(variables)}")

    def constant(value: Any) -> str:
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    def one(value: Json) -> str:
        """The text of an argument."""
        ((kind, content),) = value.items()
        if kind == "as_none":
            return "None"
        if kind == "name":
            return variables[content]
        if kind == "as_tensor" or kind == "as_name":
            return variables[content["name"] if kind == "as_tensor" else content]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return one(content)
        if kind in ("as_tensors", "as_optional_tensors", "as_sym_ints"):
            return f"[{', '.join(map(one, content))}]"
        return constant(_constant(kind, content))

    parameters = [new(each["as_tensor"]["name"]) for each in graph["inputs"]]
    lines: list[tuple[str, list[str]]] = []  # each with the variables that it reads
    for node in graph["nodes"]:
        if node["target"].startswith("torch.ops.aten._assert_"):
            continue
        functions.append(_operator(node["target"]))
        given = [(each["name"], one(each["arg"]), each["kind"]) for each in node["inputs"]]
        words = [text if kind == 1 else f"{_keyword(name)}={text}" for name, text, kind in given]
        results = [new(name) for each in node["outputs"] for name in _names(each)]
        several = len(node["outputs"]) > 1 or "as_tensors" in node["outputs"][0]
        text = f"{', '.join(results)}{',' * several} = f[{len(functions) - 1}]({', '.join(words)})"
        lines.append((text, re.findall(r"\bv\d+\b", text)))
    returned = ", ".join(one(each) for each in graph["outputs"])
    last_use = {variable: number for number, (_, used) in enumerate(lines) for variable in used}
    body = []
    for number, (text, used) in enumerate(lines):
        dead = sorted(v for v in set(used) if last_use[v] == number and not re.search(rf"\b{v}\b", returned))
        body.append(f" {text}" + "".join(f"; {variable} = None" for variable in dead))  # frees the memory
    source = "\n".join([f"def run(f, c, {', '.join(parameters)}):", *body, f" return {returned}"])
    namespace: Json = {"__builtins__": {}}
    exec(compile(source, "<exported graph>", "exec"), namespace)  # of names made here only
    return partial(namespace["run"], functions, constants)


def _operator(target: str) -> Callable:
    """The function that a node calls. Raises ValueError for one that is not allowed."""
    if target == "torch.ops.higher_order.scan":
        return _scan
    if target.startswith("_operator.") and target.removeprefix("_operator.") in _OF_SIZES:
        return getattr(operator, target.removeprefix("_operator."))
    found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if found is None or found[1] in _REFUSED:
        raise ValueError(f"it calls {target!r:.80}")
    return getattr(getattr(torch.ops.aten, found[1]), found[2])


def _scan(step: Callable, start: Sequence[Tensor], x: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """What `step` carries from one entry of each x to the next, at the end, and its other results for each entry."""
    carried, results = list(start), []
    for number in range(len(x[0])):
        made = step(*carried, *(each[number] for each in x), *others)
        carried = list(made[: len(start)])
        results.append(made[len(start) :])
    return [*carried, *(torch.stack(each) for each in zip(*results))]


def _constant(kind: str, content: Any) -> Any:
    if kind in _PLAIN:
        values = content if isinstance(content, list) else [content]
        if all(type(value) in (bool, int, float, str) for value in values):
            return float(content) if kind == "as_float" else content
    if kind == "as_scalar_type":
        return _DTYPES[content]
    if kind == "as_device" and content["type"] == "cpu":
        return torch.device("cpu")
    if kind == "as_graph":
        return _function(content["graph"])
    raise ValueError(f"a constant is {kind} {content!r:.80}")


def _names(output: Json) -> list[str]:
    """Names of the results in one output of a node."""
    ((kind, content),) = output.items()
    if kind == "as_tensor":
        return [content["name"]]
    if kind == "as_tensors":
        return [each["name"] for each in content]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return [content["as_name"]]
    raise ValueError(f"a result is {kind}")


def _keyword(name: str) -> str:
    if not re.fullmatch(r"[a-z]\w*", name, re.ASCII):
        raise ValueError(f"an argument is called {name!r:.80}")
    return name
