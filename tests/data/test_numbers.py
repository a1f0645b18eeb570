"""Dense features: what is no number is counted and reported, what no model can read is refused or quarantined."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from lumrec.data.numbers import number_facts
from lumrec.data.own_log.check import Report, check
from lumrec.data.prepare import prepare
from lumrec.data.scaling import Moments, scaled
from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.experiments.config import load
from lumrec.run.errors import UserError

SCHEMA = (
    "schema.features={item_id: {role: item}, price: {role: item, kind: dense}, speed: {role: context, kind: dense}, "
    "age: {role: user, kind: dense}}"
)
HOW_FAR = "1.2 3 4.5 6 2 3 4 5 1 2".split()


@pytest.fixture
def prepared(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[dict, str]]:
    """Manifest and printed lines of a log of ten events of one user, items and users in files of their own."""

    def make(
        *words: str,
        speed: object = HOW_FAR,
        price: object = HOW_FAR,
        age: str = "30",
        separator: str = ",",
        checking: bool = False,
    ) -> tuple[dict, str]:
        rows = [("u", f"i{n}", 1_714_521_600 + n, n % 2, value) for n, value in enumerate(speed)]
        events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label", "speed"], orient="row")
        items = pl.DataFrame({"item_id": [f"i{n}" for n in range(len(price))], "price": price})
        for name, frame in {
            "events": events,
            "items": items,
            "users": pl.DataFrame({"user_id": ["u"], "age": [age]}),
        }.items():
            frame.write_csv(tmp_path / f"{name}.csv", separator=separator)
        files = [f"data.log.{name}={tmp_path / name}.csv" for name in ("events", "items", "users")]
        config = load(None, ["data.source=log", "overwrite=true", *files, SCHEMA, *words])
        if checking:
            (tmp_path / "scratch").mkdir()
            report = Report()
            check(config, tmp_path / "scratch", report)
            return {}, str(report)
        prepare(config, tmp_path / "p")
        frame = pl.read_parquet(tmp_path / "p" / "items.parquet")
        return {"prices": frame["price"].to_list()}, capsys.readouterr().out

    return make


@pytest.mark.parametrize("outliers", [["1e30"], ["-1e29"], ["1e12", "1e12"]])
def test_a_training_row_that_would_make_all_others_one_number_is_refused(prepared: Callable, outliers: list[str]):
    speed = [str(n % 7 + 1) for n in range(60)]
    speed[3 : 3 + len(outliers)] = outliers
    with pytest.raises(
        UserError, match="schema.features.speed: .* in row .* is too far from the other numbers, such as"
    ):
        prepared(speed=speed, price=HOW_FAR * 6)
    prepared("schema.features.speed.scale=log", speed=speed, price=HOW_FAR * 6)
    prepared(speed=["0"] * 59 + ["1"], price=HOW_FAR * 6)  # a rare flag is no outlier


@pytest.mark.parametrize(
    "speed",
    [["0"] * 57 + ["1", "2", "1e18"], [str(-(2**63)) if n % 5 == 0 else str(n % 7 + 1) for n in range(60)]],
    ids=["mostly zeros", "pandas' missing whole number"],
)
def test_so_are_one_among_mostly_equal_numbers_and_a_mark_in_many_rows(prepared: Callable, speed: list[str]):
    with pytest.raises(
        UserError, match="schema.features.speed: .* in row .* is too far from the other numbers, such as"
    ):
        prepared(speed=speed, price=HOW_FAR * 6)


DRAWN = random.Random(3)
FAIR = {
    "rare flag": [int(n == 7) for n in range(3000)],
    "counts with a heavy tail": [int(DRAWN.paretovariate(0.7)) - 1 for _ in range(3000)],
    "mostly zeros, else bytes": [0 if DRAWN.random() < 0.9 else int(2 ** DRAWN.uniform(8, 30)) for _ in range(3000)],
    "log-normal prices": [round(DRAWN.lognormvariate(3, 3), 2) for _ in range(3000)],
    "probabilities": [10 ** DRAWN.uniform(-6, 0) for _ in range(3000)],
    "timestamps in nanoseconds, some missing as -1": [
        -1 if n % 9 == 0 else 1_700_000_000_000_000_000 + n * 10**13 for n in range(3000)
    ],
    "rounding noise": [DRAWN.choice([0.3, 0.1 + 0.2, 0.1 + 0.2, 1.0]) for _ in range(3000)],
    "one number": [5] * 3000,
}


@pytest.mark.parametrize("values", FAIR.values(), ids=FAIR)
def test_columns_as_logs_have_them_are_no_outliers(values: list[float], tmp_path: Path):
    pl.DataFrame({"x": values}).with_row_index("order").write_parquet(tmp_path / "block.parquet")
    schema = SchemaConfig(features={"x": FeatureConfig(role="context", kind="dense", column="x")})
    assert number_facts(schema, [tmp_path / "block.parquet"], {})["x"].rows == 3000


def test_unreadable_and_missing_numbers_are_counted_and_told(prepared: Callable):
    speed = ["", "soon", " 3 ", "0x10", "nan", "5", "6", "7", "8", "9"]
    _, text = prepared(speed=speed)
    assert "speed: 2 of 10 values are missing, 2 are no numbers (such as 'soon') and read as missing" in text
    assert "price" not in text
    _, text = prepared(speed=speed, checking=True)
    assert "speed: 2 of 10 values are missing, 2 are no numbers (such as 'soon') and read as missing" in text


def test_a_column_of_text_is_no_dense_feature(prepared: Callable):
    with pytest.raises(UserError, match="price: 6 values of column 'price' are no numbers, such as 'cheap'; kind"):
        prepared(price=["cheap"] * 6 + ["1"] * 4)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_are_found_and_decimal_commas_are_named_or_read(prepared: Callable, separator: str):
    price = ["1,5", "2", "1.234,5", "3,25", *["2"] * 6]
    with pytest.raises(UserError, match="3 values .* such as '1,5'; .*data.log.decimal_comma=.price."):
        prepared(price=price, separator=separator)
    found, _ = prepared(
        "data.log.decimal_comma=price", "schema.features.price.scale=none", price=price, separator=separator
    )
    assert found["prices"] == [1.5, 2.0, 1234.5, 3.25, *[2.0] * 6]


def test_check_finds_decimal_commas(prepared: Callable):
    _, text = prepared(
        "schema.features=" + "{item_id: {role: item}}",
        price=["1,5", "2", "3,25", *["2"] * 7],
        separator=";",
        checking=True,
    )
    assert "decimal_comma  price  (numbers such as 1,5)" in text and "decimal_comma: [price]" in text


@pytest.mark.parametrize("value", ["1e200", "-1e31", "inf", "-Infinity"])
def test_numbers_that_no_model_can_read(prepared: Callable, value: str):
    """An event is quarantined; an item or a user is an error, as all its events would go with it."""
    what = "not finite" if "nf" in value else r"beyond ±1e\+30"
    _, text = prepared(speed=[*HOW_FAR[:9], value])
    assert f"1 events: speed is {'not finite' if 'nf' in value else 'beyond ±1e+30'}" in text
    with pytest.raises(UserError, match=rf"features.price: price is {what} \(row 3, item_id 'i3'.*1 such rows\)"):
        prepared(price=[*HOW_FAR[:3], value, *HOW_FAR[4:]])
    with pytest.raises(UserError, match=rf"features.age: age is {what} \(row 0, user_id 'u'"):
        prepared(age=value)


def test_a_number_far_from_those_of_training_is_refused_with_its_row(prepared: Callable):
    with pytest.raises(UserError, match=r"features.speed: 1e\+20 in row 9 is too far from the other numbers"):
        prepared(speed=[*HOW_FAR[:9], "1e20"])
    with pytest.raises(UserError, match=r"features.price: 1e\+20 in row i3 is too far from the other numbers"):
        prepared(price=[*HOW_FAR[:3], "1e20", *HOW_FAR[4:]])
    with pytest.raises(UserError, match=r"features.speed: '2e3' in row 9 \(.*e.*deviations from the mean"):
        prepared(speed=[*["1"] * 4, "1.001", *["1"] * 4, "2e3"])  # far from those of training only
    prepared("schema.features.speed.scale=log", speed=[*HOW_FAR[:9], "1e20"])
    with pytest.raises(UserError, match="in row 1 is too far"):
        scaled(pl.Series("x", [1.0, 1e13]), "none", Moments())
