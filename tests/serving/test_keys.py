import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.run.errors import UserError
from lumrec.serving.keys import FILE, Keys, write_keys

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=600)


@settings(max_examples=30)
@given(st.lists(TEXTS, unique=True, max_size=8), st.lists(TEXTS, max_size=8))
def test_keys_of_any_text_are_found_in_their_rows_and_no_other_is(tmp_path_factory, known, asked):
    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder, {"of_item": {key: row for row, key in enumerate(known, start=1)}, "none": {}}, known)
    keys = Keys(folder, {"of_item": len(known) + 1, "none": 1}, num_items=len(known))
    asked = [*known, *asked, "half a pair \ud800"]
    assert keys.rows("of_item", asked).tolist() == [known.index(k) + 1 if k in known else 0 for k in asked]
    assert keys.items(asked).tolist() == [known.index(k) if k in known else -1 for k in asked]
    assert keys.rows("none", asked).tolist() == [0] * len(asked)
    assert keys.rows("of_item", []).tolist() == []


def test_keys_are_opened_twice_in_a_process_and_read_by_many_threads(tmp_path):
    write_keys(tmp_path, {"t": {str(i): i + 1 for i in range(1000)}}, [])
    both = [Keys(tmp_path, {"t": 1001}, num_items=0) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: both[i % 2].rows("t", [str(i), "x"]).tolist(), range(1000)))
    assert found == [[i + 1, 0] for i in range(1000)]


def test_keys_of_other_tables_or_cut_off_or_of_no_text_are_refused(tmp_path):
    write_keys(tmp_path, {"t": {"a": 1, "b": 7}}, ["i"])
    with pytest.raises(UserError, match="is damaged"):
        Keys(tmp_path, {"t": 8, "other": 1}, num_items=1)
    with pytest.raises(UserError, match="holds 1 items, expected 2"):
        Keys(tmp_path, {"t": 8}, num_items=2)
    keys = Keys(tmp_path, {"t": 2}, num_items=1)
    with pytest.raises(UserError, match="a row is beyond 2"):
        keys.rows("t", ["b"])
    with pytest.raises(UserError, match="got the int 42: say '42'"):
        keys.rows("t", [42])
    del keys
    os.truncate(tmp_path / FILE, 100)
    with pytest.raises(UserError, match="is damaged"):
        Keys(tmp_path, {"t": 8}, num_items=1)
