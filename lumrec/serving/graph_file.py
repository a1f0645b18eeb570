"""An exported graph as a file (.pt2), written so that it can be checked before torch reads it, and checked.

torch.export.load is made for files that one trusts. Of a .pt2 it unpickles example inputs, objects and some weights; it
hands expressions of sizes to SymPy, which evaluates them as Python; it executes guards as Python; and a node may name
any function of torch. A file that `save_graph` wrote needs none of these, and `read_graph` refuses every other one:

    data/sample_inputs/   empty                          weights, constants   plain numbers, no pickle
    guards_code           empty                          expr_str             sums, products, … of symbols
    target                operators, of an allow-list    other texts          names

What an attacker may still do is to give other scores, or to read memory by an operator that does not check its input:
a bundle from someone else is to be compared with the SHA-256 that its maker gives (see docs/security.md).
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lumrec.run.errors import UserError

_FILES = re.compile(
    r"(models/model\.json|data/(weights|constants)/(weight_\d+|tensor_\d+|model_\w+_config\.json)|"
    r"data/sample_inputs/model\.pt|archive_(format|version)|\.data/(version|serialization_id)|byteorder)"
)
_SYMBOLIC = "eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|not_|getitem"
_TARGET = re.compile(
    r"torch\.ops\.(aten|fbgemm)\.\w+\.\w+|torch\.ops\.higher_order\.scan|"
    rf"_operator\.({_SYMBOLIC})|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
)
_REFUSED_OPERATORS = ("from_file",)
_NAMES = re.compile(r"[\w.+\-]*")
_IN_EXPRESSION = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Pow, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_FUNCTIONS = set(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min And Or Not Eq Ne Lt Le Gt Ge Equality Unequality "
    "StrictLessThan LessThan StrictGreaterThan GreaterThan FloorDiv PythonMod CleanDiv CeilDiv CeilToInt FloorToInt "
    "ToFloat IntTrueDiv FloatTrueDiv TruncToInt ModularIndexing Where Identity true false oo int_oo".split()
)


def save_graph(program: ExportedProgram, path: Path) -> None:
    """Writes a graph without what `read_graph` refuses: example inputs, guards, and where its lines came from."""
    program._example_inputs = None
    program._guards_code = []
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for name in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node"):
                node.meta.pop(name, None)
    torch.export.save(program, path)
    check_graph(path)


def read_graph(path: Path) -> ExportedProgram:
    """The graph that `save_graph` wrote. Raises UserError for any other file, before torch reads it."""
    check_graph(path)
    return torch.export.load(path)


def check_graph(path: Path) -> None:
    """Raises UserError for a .pt2 that `save_graph` did not write (see above)."""
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _problem(archive)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        problem = f"it cannot be read ({error})"
    if problem:
        raise UserError(f"{path} is no graph that lumrec exported: {problem}. It was not opened; export it again")


def _problem(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    root = names[0].partition("/")[0]
    inner = [name.removeprefix(f"{root}/") for name in names]
    if len(set(inner)) < len(inner):
        return "a file is in it twice"
    for name, info in zip(inner, archive.infolist()):
        if not _FILES.fullmatch(name):
            return f"it holds {name!r:.80}, which may be code"
        if name.startswith("data/sample_inputs/") and info.file_size:
            return "it holds example inputs, which would be unpickled"
        if name.endswith(".json") and (found := _walk(json.loads(archive.read(info)), "")):
            return found
    return ""


def _walk(value: Any, key: str) -> str:
    """What a file's JSON holds that torch would execute or unpickle, in words; "" where there is nothing."""
    if isinstance(value, dict):
        if key == "custom_obj_values" and value:
            return "it holds objects, which would be unpickled"
        of_names = "expr_str" if key == "range_constraints" else ""
        return next(
            (found for name, inner in value.items() if (found := _text(name, of_names) or _walk(inner, name))), ""
        )
    if isinstance(value, list):
        if key == "guards_code" and value:
            return "it holds guards, which would be executed"
        return next((found for inner in value if (found := _walk(inner, key))), "")
    if key == "use_pickle" and value is not False:
        return "it holds pickled weights"
    return _text(value, key) if isinstance(value, str) else ""


def _text(text: str, key: str) -> str:
    if key == "target":
        known = bool(_TARGET.fullmatch(text)) and text.split(".")[-2] not in _REFUSED_OPERATORS
    elif key == "expr_str":
        known = _is_expression(text)
    elif key == "as_string":  # of an operator: how it sums or rounds
        known = bool(re.fullmatch(r"[\w,.> -]*", text))
    elif key in ("in_spec", "out_spec"):
        return _walk_spec(json.loads(text))
    else:
        known = bool(_NAMES.fullmatch(text))
    return "" if known else f"{key or 'a name'} is {text!r:.80}"


def _is_expression(text: str) -> bool:
    """Whether SymPy would evaluate the text to a number, a symbol or arithmetic of these: it hands texts to eval."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError):
        return False
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    functions = [node.id for node in nodes if isinstance(node, ast.Name)]
    return (
        all(isinstance(node, _IN_EXPRESSION) for node in nodes)
        and all(name in _FUNCTIONS or re.fullmatch(r"[a-z]+\d+", name) for name in functions)
        and all(re.fullmatch(r"[a-z]+\d+", each) for each in texts)
    )


def _walk_spec(spec: Any) -> str:
    """What a tree of inputs or outputs names that is no tuple, list or dict."""
    if isinstance(spec, list):
        return next((found for inner in spec if (found := _walk_spec(inner))), "")
    if isinstance(spec, dict):
        if spec.get("type") not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
            return f"its inputs or outputs are of the type {spec['type']!r:.80}"
        if not re.fullmatch(r'[\w\[\]", :-]*', str(spec.get("context"))):
            return f"its inputs or outputs are named {spec['context']!r:.80}"
        return _walk_spec(spec.get("children_spec", []))
    return "" if isinstance(spec, int) else f"its inputs are {spec!r:.80}"
