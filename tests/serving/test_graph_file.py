import contextlib
import io
import os
import pickle
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
    run = read_graph(path).module()
    for num_rows, num_bags in ((5, 2), (2, 3), (9, 30)):
        offsets_B1 = torch.arange(num_bags + 1) * 2
        args = torch.randn(num_rows, 4), torch.randint(0, num_rows, (2 * num_bags,)), offsets_B1
        torch.testing.assert_close(run(*args), model(*args))
    with zipfile.ZipFile(path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert os.path.dirname(__file__).encode() not in everything and b"site-packages" not in everything


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


EXPRESSION = "Symbol('s23', positive=True, integer=True)"


@pytest.mark.parametrize(
    "name, old, new, why",
    [
        ("models/model.json", '"guards_code": []', "\"guards_code\": [\"open('executed', 'w')\"]", "guards"),
        ("models/model.json", "torch.ops.aten.linear.default", "torch.hub.os.system", "target is"),
        ("models/model.json", "torch.ops.aten.linear.default", "torch.ops.aten.from_file.default", "target is"),
        ("models/model.json", "builtins.tuple", "collections.defaultdict", "of the type"),
        ("models/model.json", "Symbol(", "__import__('os').system(", "expr_str is"),
        ("models/model.json", "Symbol(", "sympify(", "expr_str is"),
        ("models/model.json", '"name": "linear"', '"name": "x; import os"', "name is"),
        ("data/weights/model_weights_config.json", '"use_pickle": false', '"use_pickle": true', "pickled"),
        ("data/sample_inputs/model.pt", "", "x", "example inputs"),
    ],
)
def test_what_torch_would_execute_or_unpickle_is_refused(saved, monkeypatch, tmp_path, name, old, new, why):
    monkeypatch.chdir(tmp_path)
    changed = []

    def change(file, content):
        if not file.endswith(name):
            return content
        changed.append(file)
        if new == "x":
            return pickle.dumps(Evil())
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    rewritten(saved[0], change)
    assert changed
    with pytest.raises(UserError, match=f"no graph that lumrec exported: .*{why}"):
        read_graph(saved[0])
    assert not (tmp_path / "executed").exists()


def test_a_library_in_the_archive_or_no_archive_at_all_is_refused(saved):
    path = saved[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("graph/data/aotinductor/model/x.so", b"")
    with pytest.raises(UserError, match="which may be code"):
        read_graph(path)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read"):
        read_graph(path)


def test_torch_itself_would_have_unpickled_the_example_inputs(saved, monkeypatch, tmp_path):
    """The reason for the checks; where torch no longer does, this test says so."""
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save((Evil(),), pickled)
    rewritten(saved[0], lambda file, content: pickled.getvalue() if "sample_inputs" in file else content)
    with contextlib.suppress(Exception):
        torch.export.load(saved[0])
    assert (tmp_path / "executed").exists()
