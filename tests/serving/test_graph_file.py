import contextlib
import io
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from lumrec.run.errors import UserError
from lumrec.serving.graph_file import read_graph, save_graph


class Sum(nn.Module):
    """Bags of a table's rows, through a layer: sizes, constants and operators as rankers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("one", torch.ones(3))

    def forward(self, table, ids_V, offsets_B1):
        bags = nn.functional.embedding_bag(ids_V, table, offsets_B1, mode="sum", include_last_offset=True)
        return (self.layer(bags) + self.one).sigmoid().sum(1)[: offsets_B1.shape[0] - 1]


@pytest.fixture
def saved(tmp_path):
    inputs = (torch.randn(9, 4), torch.randint(0, 9, (7,)), torch.tensor([0, 2, 3, 7]))
    model = Sum().eval()
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    save_graph(torch.export.export(model, inputs, dynamic_shapes=dynamic), tmp_path / "graph.pt2")
    return tmp_path / "graph.pt2", model


def rewritten(path, change):
    """The archive at `path` with `change(name, content)` in place of each content; None leaves a file out."""
    old = path.with_suffix(".old")
    os.rename(path, old)
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            content = change(info.filename, source.read(info))
            if content is not None:
                target.writestr(info.filename, content)


def test_a_saved_graph_gives_the_same_for_other_sizes_and_names_no_path_of_this_machine(saved):
    path, model = saved
    run = read_graph(path)
    for num_rows, num_bags in ((5, 2), (2, 3), (9, 30)):
        offsets_B1 = torch.arange(num_bags + 1) * 2
        args = torch.randn(num_rows, 4), torch.randint(0, num_rows, (2 * num_bags,)), offsets_B1
        torch.testing.assert_close(run(*args), model(*args))
        torch.testing.assert_close(torch.export.load(path).module()(*args), model(*args))
    with zipfile.ZipFile(path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert os.path.dirname(__file__).encode() not in everything and b"site-packages" not in everything


def test_reading_a_graph_loads_no_compiler():
    code = (
        "import sys, lumrec.serving.graph_file; print({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


BIAS = '{"name": "bias", "arg": {"as_tensor": {"name": "p_layer_bias"}}, "kind": 1}'


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "name, old, new, why",
    [
        ("models/model.json", "torch.ops.aten.linear.default", "torch.hub.os.system", "it calls 'torch.hub.os.system'"),
        ("models/model.json", "torch.ops.aten.linear.default", "torch.ops.aten.from_file.default", "it calls"),
        ("models/model.json", "torch.ops.aten.linear.default", "_operator.attrgetter", "it calls"),
        ("models/model.json", "torch.ops.aten.linear.default", "torch.ops.aten.no_such.default", "no_such"),
        ("models/model.json", BIAS, BIAS.replace("bias", "x=open()", 1).replace("1}", "2}"), "an argument is called"),
        ("models/model.json", '"as_int": 0', '"as_custom_obj": 0', "a constant is as_custom_obj"),
        ("data/weights/model_weights_config.json", '"use_pickle": false', '"use_pickle": true', "pickled"),
        ("data/weights/model_weights_config.json", '"as_int": 4', '"as_int": 4000', "storage"),
        ("data/weights/weight_0", "", "", "KeyError"),
    ],
)
def test_what_no_graph_of_ours_has_is_refused(saved, name, old, new, why):
    changed = []

    def change(file, content):
        if not file.endswith(name):
            return content
        changed.append(file)
        assert old.encode() in content
        return content.replace(old.encode(), new.encode()) if old else None

    rewritten(saved[0], change)
    assert changed
    with pytest.raises(UserError, match=f"no graph that lumrec exported .*({why})"):
        read_graph(saved[0])


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"guards_code": []', b"\"guards_code\": [\"open('executed', 'w')\"]"),
        (b"Symbol('s", b"__import__('os').system('touch executed') or Symbol('s"),
        (b'"name": "linear"', b"\"name\": \"open('executed', 'w')\""),
        (b'"verifiers": ["', b"\"verifiers\": [\"__import__('os').system('touch executed')"),
    ],
)
def test_nothing_that_a_file_says_is_executed_or_unpickled(saved, monkeypatch, tmp_path, old, new):
    monkeypatch.chdir(tmp_path)
    path, model = saved
    pickled = io.BytesIO()
    torch.save((Evil(),), pickled)

    def change(file, content):
        assert old in content or not file.endswith("model.json")
        return pickled.getvalue() if "sample_inputs" in file else content.replace(old, new)

    rewritten(path, change)
    args = torch.randn(9, 4), torch.randint(0, 9, (4,)), torch.tensor([0, 2, 4])
    torch.testing.assert_close(read_graph(path)(*args), model(*args))
    assert not (tmp_path / "executed").exists()


def test_what_is_no_archive_of_a_graph_is_refused(saved, tmp_path):
    for content in (b"PK", b"", saved[0].read_bytes()[:1000]):
        (tmp_path / "cut.pt2").write_bytes(content)
        with pytest.raises(UserError, match="no graph that lumrec exported"):
            read_graph(tmp_path / "cut.pt2")


def test_torch_itself_would_have_unpickled_the_example_inputs(saved, monkeypatch, tmp_path):
    """The reason for the checks; where torch no longer does, this test says so."""
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save((Evil(),), pickled)
    rewritten(saved[0], lambda file, content: pickled.getvalue() if "sample_inputs" in file else content)
    with contextlib.suppress(Exception):
        torch.export.load(saved[0])
    assert (tmp_path / "executed").exists()
