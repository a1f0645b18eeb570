"""Names that become keys, files and modules: a column may be called anything, features and tables may not."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.own_log import check
from lumrec.data.own_log.column_facts import ColumnFacts
from lumrec.data.own_log.suggest import as_schema, as_yaml, suggest
from lumrec.data.own_log.tables import readable
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import RESERVED, FeatureConfig, SchemaConfig, TableConfig, validate
from lumrec.experiments.config import load

NASTY = [
    *("+.4f", "a.b", "a[0]", "[x]", "{y}", "${HOME}", "$x", "$$", "it's", '"', "a b", "a_b", "a-b", "-a", "--config"),
    *("null", "true", "NO", "base", "<name>", "~", "1", "1e5", "0x10", "12:30", "2024-05-01", "<<", "&x", "!!int", "#"),
    *(
        "*",
        "^a.*$",
        "^$",
        "?",
        "%s",
        "{0}",
        "=",
        "a=b",
        "/",
        "..",
        "../../x",
        "a/b",
        "a\\b",
        "\\",
        "a\nb",
        "\t",
        "\x00",
    ),
    *("\x1b[31m", "\u2028", "\ufeff", "\u202eabc", "é", "e\u0301", "Å", "\u212b", "ß", "SS", "名前", "🙂", "İ", "ı"),
    *("Brand", "brand", "BRAND", "type", "values", "keys", "training", "forward", "_modules", "__class__", "place"),
    *("item", "user", "block", "title", "split", "table", "reason", "raw", "order", "probability", "len of entity"),
    *("x" * 300, "🙂" * 100, "hour", "Hour", "weekday", "user_key", "missing a", "a", "lumrec", "column", "column_2"),
]
ANY = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(NASTY)


def facts(column: str, table: str = "events") -> ColumnFacts:
    """A column of texts that repeat."""
    return ColumnFacts(table, column, pl.String(), 60, 0.0, 3, ("x",), False, False, False)


@settings(max_examples=30)
@given(st.lists(st.tuples(ANY, st.sampled_from(["events", "items"])), max_size=8))
@example([(name, "events") for name in NASTY])
def test_the_suggested_schema_is_read_back_whatever_the_columns_are_called(tmp_path_factory, columns):
    given_names = readable([name for name, _ in columns])
    facts_of = [facts(given_names[name], table) for name, table in columns]
    suggestions = suggest(facts_of, keys=[], label="", known_after=[], made_of_time=["hour", "weekday"])
    schema, left_out = as_schema(suggestions), {s.column: s.why for s in suggestions if s.feature is None}
    config = tmp_path_factory.getbasetemp() / "names.yaml"
    config.write_text(as_yaml(DataConfig(), schema, {s.name: s.why for s in suggestions}, left_out))
    read = load(config, [])
    assert read.schema == schema
    columns_read = {feature.column for feature in validate(read.schema).features.values()} | set(left_out)
    assert columns_read >= {f.name for f in facts_of if f.name not in ("feedback", "time_of_day")}
    again = tmp_path_factory.getbasetemp() / "again.yaml"
    again.write_text(yaml.safe_dump({"schema": {"features": {n: vars(f) for n, f in read.schema.features.items()}}}))
    assert load(again, []).schema.features == read.schema.features


def test_a_log_with_all_of_these_names_is_prepared_and_read_back(tmp_path: Path):
    n = range(60)
    names = [*NASTY, ""]
    log = {"user_id": [f"u{k % 6}" for k in n], "item_id": [k % 5 for k in n], "label": [int(k % 3 == 0) for k in n]}
    log["timestamp"] = [1_714_521_600 + 3600 * k for k in n]
    values = {name: [f"{place}-{k % (2 + place % 5)}" for k in n] for place, name in enumerate(names)}
    pl.DataFrame({**log, **values}).write_parquet(tmp_path / "log.parquet")
    (scratch := tmp_path / "scratch").mkdir()
    report = check.Report()
    check.check(load(None, [f"data.log.events={tmp_path / 'log.parquet'}"]), scratch, report)
    (config := tmp_path / "my.yaml").write_text(report.yaml)
    all_training = "data.split={kind: user, fractions: [1, 0, 0]}"  # a vocabulary has the values of the training part
    assert prepare(load(config, [all_training]), tmp_path / "prepared")["events"] == 60
    data = PreparedData.open(tmp_path / "prepared")
    of_column = {feature.column: name for name, feature in data.schema.features.items()}
    found = 0
    for name in names:
        column = {"reason": "reason_raw", "raw": "raw_raw", "order": "order_raw", "probability": "probability_raw"}.get(
            readable(names)[name], readable(names)[name]
        )
        if column not in of_column:
            assert name in ("hour", "weekday", "title"), name
            continue
        found += 1
        feature = data.schema.features[of_column[column]]
        rows = {row: key for key, row in data.vocabulary(feature.table).items()}
        if feature.role in ("condition", "feedback", "context") and name not in ("hour", "weekday"):
            read = [rows[row] for row in data.event_columns[of_column[column]].values.tolist()]
            assert read == [values[name][order] for order in data.order.tolist()], name
        else:
            assert set(rows.values()) == set(values[name]), name
    assert found > len(names) - 4
    assert len(list((tmp_path / "prepared" / "vocabulary").iterdir())) == len(data.table_rows)


@pytest.mark.parametrize("column", ["place", "item", "user", "block", "reason", "len of entity"])
def test_rows_that_differ_in_one_column_are_no_duplicates(tmp_path: Path, column: str):
    """Whatever that column is called: names of columns that the work in hand adds are kept apart from the log's."""
    log = {"user_id": ["u", "u", "v"], "item_id": [7, 7, 8], "timestamp": [1_714_521_600] * 3, "label": [1, 1, 0]}
    pl.DataFrame({**log, column: [11, 12, 11]}).write_parquet(tmp_path / "log.parquet")
    words = [f"data.log.events={tmp_path / 'log.parquet'}", "data.source=log", "data.split.fractions=[1, 0, 0]"]
    words += [f"schema.features={{item_id: {{role: item}}, x: {{role: context, column: '{column}_raw'}}}}"]
    if column != "reason":
        words[-1] = words[-1].replace("_raw", "")
    prepare(load(None, words), tmp_path / "prepared")
    data = PreparedData.open(tmp_path / "prepared")
    rows = {row: key for key, row in data.vocabulary("x").items()}
    assert [rows[row] for row in data.event_columns["x"].values.tolist()] == ["11", "12", "11"]
    assert [data.item_keys()[item] for item in data.item.tolist()] == ["7", "7", "8"]
    assert data.user.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a.b": {}}, r"schema.features: got the name 'a.b', expected letters, digits.*column: 'a.b'"),
        ({"": {}}, "got the name ''"),
        ({"-a": {}}, "got the name '-a'"),
        ({"../x": {}}, r"got the name '\.\./x'"),
        ({"x" * 300: {}}, "got the name 'xxx.*…', expected .* at most 200 bytes"),
        ({"a": {"table": "../../x"}}, r"the table of a feature: got the name '\.\./\.\./x'"),
        ({"type": {}}, "a table cannot be called 'type', as modules of torch have .* such as table: type_table"),
        ({"a": {"table": "values"}}, "a table cannot be called 'values'"),
        ({"Brand": {}, "brand": {}}, "the tables 'Brand' and 'brand' differ only in case"),
        ({"Å": {}, "\u212b": {}}, "differ only in case"),
    ],
)
def test_names_that_features_and_tables_cannot_have(features: dict, message: str):
    made = {name: FeatureConfig("context", **rest) for name, rest in features.items()}
    with pytest.raises(ValueError, match=message):
        validate(SchemaConfig(features={"item_id": FeatureConfig("item"), **made}))


def test_names_that_they_can_have():
    names = ["NO", "null", "true", "1", "1e5", "_x", "a-b", "名前", "é", "ß", "SS", "base", "x" * 200]
    features = {name: FeatureConfig("context") for name in names}
    features |= {"type": FeatureConfig("context", table="type_table"), "values": FeatureConfig("context", kind="dense")}
    with pytest.raises(ValueError, match="'ß' and 'SS'"):
        validate(SchemaConfig(features={"item_id": FeatureConfig("item"), **features}))
    del features["SS"]
    schema = validate(SchemaConfig(features={"item_id": FeatureConfig("item"), **features}))
    assert set(schema.tables) >= {"NO", "type_table"} and "values" not in schema.tables
    with pytest.raises(ValueError, match=r"schema.tables: got the name 'a b'"):
        validate(SchemaConfig(features={"item_id": FeatureConfig("item")}, tables={"a b": TableConfig()}))
    assert all(re.fullmatch(r"\w+", name) for name in RESERVED)


def test_columns_that_polars_would_take_for_patterns():
    assert readable(["a", "*", "_*", "^x$", "^", "$", ""]) == {
        "a": "a", "*": "__*", "_*": "_*", "^x$": "_^x$", "^": "^", "$": "$", "": "_"
    }  # fmt: skip
