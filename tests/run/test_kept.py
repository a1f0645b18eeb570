"""Arrays that are computed once and kept: the same in every process, and made again where they are not whole."""

from pathlib import Path

import numpy as np
import pytest

from lumrec.run.errors import UserError
from lumrec.run.kept import kept_arrays


def maker(calls: list[int]):
    def make(new):
        calls.append(1)
        new("numbers", (4, 2), np.float32)[:] = np.arange(8).reshape(4, 2)
        new("none", (4, 0), np.int64)
        return {"mean": 3.5}

    return make


def test_it_is_computed_once_for_what_it_depends_on(tmp_path):
    calls: list[int] = []
    for _ in range(3):
        arrays, facts = kept_arrays(tmp_path / "kept", "rows", {"data": "a"}, maker(calls))
        assert arrays["numbers"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and arrays["none"].shape == (4, 0)
        assert facts == {"mean": 3.5} and isinstance(arrays["numbers"], np.memmap)
    assert len(calls) == 1
    kept_arrays(tmp_path / "kept", "rows", {"data": "b"}, maker(calls))
    assert len(calls) == 2 and len([*(tmp_path / "kept").glob("rows-*")]) == 2


@pytest.mark.parametrize("name", ["numbers.npy", "manifest.json"])
@pytest.mark.parametrize("change", ["cut", "changed", "removed"])
def test_what_is_damaged_is_made_again(tmp_path, name, change):
    calls: list[int] = []
    kept_arrays(tmp_path, "rows", {}, maker(calls))
    (folder,) = tmp_path.glob("rows-*")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3] if change == "cut" else content[:-1] + b"\x01")
    if change == "removed":
        (folder / name).unlink()
    arrays, _ = kept_arrays(tmp_path, "rows", {}, maker(calls))
    assert len(calls) == 2 and arrays["numbers"][3].tolist() == [6, 7]


def test_nothing_is_left_of_what_fails(tmp_path):
    def failing(new):
        new("numbers", (3,), np.int64)
        raise UserError("no events")

    with pytest.raises(UserError, match="no events"):
        kept_arrays(tmp_path, "rows", {}, failing)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    calls: list[int] = []
    assert kept_arrays(tmp_path, "rows", {}, maker(calls))[1] == {"mean": 3.5}


def test_where_nothing_can_be_written_the_arrays_are_in_memory_and_a_line_says_so(caplog):
    arrays, facts = kept_arrays(Path("/sys/kept"), "rows", {}, maker([]))
    assert arrays["numbers"][3].tolist() == [6, 7] and facts == {"mean": 3.5}
    assert "/sys/kept" in caplog.text and "each process computes in its memory" in caplog.text
