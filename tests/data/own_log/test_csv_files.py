"""CSV in the separators and encodings that it is found in."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from lumrec.data.config import DataConfig
from lumrec.data.own_log.config import LogConfig
from lumrec.data.own_log.read import read
from lumrec.experiments.config import load
from lumrec.run.errors import UserError

TEXT = (
    "user_id;item_id;timestamp;label;scene\nu;007;1714521600;1;caf\u00e9\nu;8;1714521601;0;a,b\nu;9;1714521602;0;x|y\n"
)


def scenes(path: Path, **fields: object) -> list[str]:
    (scratch := path.parent / f"scratch-{path.name}").mkdir()
    log = LogConfig(events=str(path), **fields)
    frame = read(DataConfig(source="log", log=log), seed=0, scratch=scratch).events.sort("order").collect()
    assert frame["item_id"].to_list() == ["007", "8", "9"] and frame["reason"].null_count() == 3
    return frame["scene"].to_list()


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("given", [",", None])
def test_a_separator_is_found_or_said(tmp_path: Path, separator: str, given: str | None):
    text = TEXT.replace("a,b", "ab").replace("x|y", '"x|y"') if separator != ";" else TEXT
    (path := tmp_path / "log.csv").write_text(text.replace(";", separator))
    said = {"\t": "\\t"}.get(separator, separator) if given is None else given
    assert scenes(path, separator=said)[2] == "x|y"


def test_a_tab_is_typed_as_it_is_in_a_shell(tmp_path: Path):
    (path := tmp_path / "log.csv").write_text(TEXT.replace(";", "\t"))
    config = load(None, [f"data.log.events={path}", "data.log.separator=\\t", "data.source=log"])
    assert "scene" in read(config.data, seed=0, scratch=tmp_path).events.collect_schema()


def test_rows_that_are_off_do_not_change_a_separator_that_fits(tmp_path: Path):
    lines = ["user_id,item_id,timestamp,label,scene", "u,007,1714521600,1,a;b;c;d;e;f", "u,8", "u,9,1714521602,0,c"]
    (path := tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    raw = read(DataConfig(source="log", log=LogConfig(events=str(path))), seed=0, scratch=tmp_path)
    assert raw.events.sort("order").collect()["reason"].to_list() == [None, "2 fields, expected 5", None]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_encodings_are_found_by_their_mark_or_said(tmp_path: Path, encoding: str):
    (path := tmp_path / "log.csv").write_bytes(TEXT.encode(encoding))
    has_mark = encoding in ("utf-8-sig", "utf-16", "utf-32")
    assert scenes(path, **({} if has_mark else {"encoding": encoding}))[0] == "café"


def test_an_encoding_that_is_not_said_is_named(tmp_path: Path):
    (path := tmp_path / "log.csv").write_bytes(TEXT.encode("utf-16-be"))
    with pytest.raises(UserError, match="log.csv is not utf8 text .*; try data.log.encoding=utf-16-be"):
        scenes(path)
    (path := tmp_path / "names.csv").write_bytes(TEXT.replace("scene", "sc\u00e8ne").encode("latin-1"))
    with pytest.raises(UserError, match="the names of the columns are not utf8 text; .*data.log.encoding=latin-1"):
        scenes(path)
    (path := tmp_path / "plain.csv").write_text("user_id")
    with pytest.raises(UserError, match="plain.csv does not begin with .* of utf-16; say data.log.encoding=utf-16-le"):
        scenes(path, encoding="utf16")
    with pytest.raises(UserError, match="data.log.encoding: got 'idna', expected the name of an encoding"):
        load(None, ["data.source=log", f"data.log.events={path}", "data.log.encoding=idna"])
    (path := tmp_path / "cut.csv").write_bytes(codecs.BOM_UTF16_LE)
    with pytest.raises(UserError, match="is empty"):
        scenes(path)
