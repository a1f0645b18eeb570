"""`apps/prepare.py --check`: what it tells of a log, that it writes nothing, that its config can be used as it is."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import time as clock
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torchx.cli.main import run_main

from lumrec.data.own_log import check
from lumrec.data.own_log.guess import is_condition, is_known_after, positive_of
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.sources.raw_log import LabelConfig
from lumrec.experiments.config import load
from lumrec.launch.main import run_command
from lumrec.launch.torchx import CmdRunFile, with_values
from lumrec.run.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHOP = Path(__file__).parents[3] / "examples" / "shop"


def suggested(text: str) -> str:
    """The config between the two lines."""
    _, _, behind = text.partition("save from here as my-log.yaml")
    return behind.partition("\n")[2].partition("# ----")[0]


def test_what_a_killed_check_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = {name: tmp_path / f"{check.SCRATCH}{name}" for name in ("dead", "young", "alive")}
    for name, folder in folders.items():
        (folder / "source").mkdir(parents=True)
        if name != "young":
            os.utime(folder, (0, 0))
    (tmp_path / f"{check.SCRATCH}link").symlink_to(folders["young"])
    lock = os.open(folders["alive"], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    check.run(load(None, [f"data.log.events={SHOP / 'clicks.csv'}"]))
    os.close(lock)
    assert sorted(os.listdir(tmp_path)) == sorted(f"{check.SCRATCH}{name}" for name in ("alive", "link", "young"))


def test_a_first_look_without_a_config_ends_with_one_that_prepares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = [f"data.log.events={SHOP / 'clicks.csv'}", f"data.log.items={SHOP / 'products.csv'}"]
    run_command("prepare", ["--check", *words])
    text = capsys.readouterr().out
    assert os.listdir(tmp_path) == []  # nothing stays, not even the temporary folder
    for expected in (
        "events clicks.csv (300 rows)",
        "user: user",
        "item: product",
        "timestamp: time",
        "values: [buy, cart]",
        "duplicate row",
        "8 fields, expected 7",
        "unknown item",
    ):
        assert expected in text, text
    assert "known only after the item was shown: dwell_s" in text
    (config := tmp_path / "my-log.yaml").write_text(suggested(text))
    result = prepare(load(config, [f"runs_dir={tmp_path}"]), tmp_path / "prepared")
    assert (result["events"], result["events_quarantined"]) == (295, 5)
    data = PreparedData.open(tmp_path / "prepared")
    assert "feedback" in data.event_columns
    assert "dwell_s" not in data.schema.features


def test_a_config_is_checked_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    runs = tmp_path / "runs"
    check.run(load(SHOP / "shop.yaml", [f"runs_dir={runs}"]))
    text = capsys.readouterr().out
    assert "295 of 300 events" in text
    assert not runs.exists()


def test_other_sources_are_checked_too(capsys: pytest.CaptureFixture):
    check.run(load(None, ["data.source=simulator", "data.simulator.num_users=50", "data.simulator.events_per_user=20"]))
    text = capsys.readouterr().out
    assert "of 50 users" in text
    assert "% positive" in text


def test_errors_are_those_of_prepare(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        run_command("prepare", ["--check", f"data.log.events={tmp_path / 'no.csv'}"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "leads to no file" in said and "Traceback" not in said


@pytest.fixture
def look(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., check.Report]:
    """The report on a log of these columns."""

    def looker(columns: dict, *words: str, items: dict | None = None) -> check.Report:
        folder = tmp_path_factory.mktemp("look")
        pl.DataFrame(columns).write_parquet(folder / "log.parquet")
        if items is not None:
            pl.DataFrame(items).write_parquet(folder / "items.parquet")
            words = (f"data.log.items={folder / 'items.parquet'}", *words)
        (scratch := folder / "scratch").mkdir()
        report = check.Report()
        check.check(load(None, [f"data.log.events={folder / 'log.parquet'}", *words]), scratch, report)
        return report

    return looker


def shop_log(**columns: object) -> dict:
    """60 events of six users on five items; keywords replace or add columns."""
    n = range(60)
    usual = {
        "uid": [f"u{k % 6}" for k in n],
        "sku": [k % 5 for k in n],
        "ts": [1_714_521_600 + 3600 * k for k in n],
        "clicked": [int(k % 3 == 0) for k in n],
    }
    return {**usual, **columns}


def features(report: check.Report) -> dict:
    return yaml.safe_load(report.yaml)["schema"]["features"]


@pytest.mark.parametrize(
    ("user", "item", "moment", "label"),
    [
        ("user_id", "item_id", "timestamp", "label"),
        ("userId", "movieId", "ts", "rating"),
        ("Customer ID", "ProductID", "Event Time", "is_click"),
        ("visitorid", "itemid", "created_at", "event"),
        ("u_unused", "video_id", "time_ms", "long_view"),
    ],
)
def test_columns_are_known_by_their_names(look: Callable, user: str, item: str, moment: str, label: str):
    log = shop_log()
    values = {"rating": [1 + k % 5 for k in range(60)], "event": ["view", "addtocart", "view"] * 20}
    columns = {user: log["uid"], "noise": [0.5] * 60, item: log["sku"], moment: log["ts"]}
    columns[label] = values.get(label, log["clicked"])
    words = ["data.log.user=u_unused"] if user == "u_unused" else []
    found = yaml.safe_load(look(columns, *words).yaml)["data"]
    assert found["log"].get("user", "user_id") == user
    assert found["log"].get("item", "item_id") == item
    assert found["log"].get("timestamp", "timestamp") == moment
    assert found["label"]["column"] == label
    assert found["label"].get("at_least") == (4.0 if label == "rating" else None)
    assert found["label"].get("values") == (["addtocart"] if label == "event" else None)


def test_a_column_that_cannot_be_told_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture):
    pl.DataFrame({"a": ["x"], "b": ["y"], "when": [1_714_521_600]}).write_csv(tmp_path / "log.csv")
    with pytest.raises(
        ValueError,
        match="has the name of a user or of an item. Name them, data.log.user=<column> data.log.item=<column>",
    ):
        check.run(load(None, [f"data.log.events={tmp_path / 'log.csv'}"]))
    assert "a, b, when" in capsys.readouterr().out  # what was found so far


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, None], LabelConfig("c")),
        ([True, False], LabelConfig("c")),
        (["yes", "no"], LabelConfig("c")),
        ([1, 2, 3, 4, 5], LabelConfig("c", at_least=4.0)),
        (["0.5", "3", "5.0"], LabelConfig("c", at_least=4.0)),
        ([1, 5, 10], LabelConfig("c", at_least=8.0)),
        (["pv", "cart", "buy", "fav"], LabelConfig("c", values=["buy", "cart", "fav"])),
        (["impression", "click", "purchase"], LabelConfig("c", values=["click", "purchase"])),
        (["click", "purchase"], LabelConfig("c", values=["purchase"])),
        (["red", "green"], None),
        ([17_000, 3, 250_000], None),
        (["0", "1"] * 30 + ["x"], LabelConfig("c")),
        (["0", "1", "x"], None),
        ([-1, 0, 1, 2], None),
        ([None], None),
        ([[1], [0]], None),
    ],
)
def test_what_counts_as_positive(values: list, expected: LabelConfig | None):
    made = positive_of(pl.Series(values), "c")
    assert (made[0] if made else None) == expected


def test_names_that_tell_when_a_column_is_known():
    for name in (
        "ms_played",
        "secondsListened",
        "skipped",
        "skips",
        "dwell_s",
        "watchTime",
        "play_time_ms",
        "is_like",
        "completion_rate",
        "purchased",
        "order_amount",
    ):
        assert is_known_after(name), name
    for name in ("price", "brand", "scene", "category", "position", "user_age", "order_channel", "city"):
        assert not is_known_after(name), name
    for name in ("scene", "page", "searchQuery", "tab", "channel", "main_category"):
        assert is_condition(name), name
    assert not is_condition("table_id")


def test_values_of_a_small_log_are_counted_exactly(look: Callable):
    report = look(shop_log(uid=[f"u{k % 27}" for k in range(60)], price=[k / 7 for k in range(60)]))
    lines = {line.split()[1]: line.split() for line in report.lines if line.startswith("  events ")}
    assert (lines["uid"][4], lines["sku"][5], lines["price"][4]) == ("27", "5", "60")


def test_a_column_that_tells_the_label_is_taken_for_known_afterwards(look: Callable):
    n = range(600)
    log = shop_log(
        uid=[f"u{k % 20}" for k in n], sku=[k % 7 for k in n], ts=[1_714_521_600 + 3600 * k for k in n],
        clicked=[int(k % 3 == 0) for k in n], verweildauer=[(20 if k % 3 == 0 else 1) + k % 5 + k / 1000 for k in n],
        outcome_text=["a" if k % 3 == 0 and k % 7 else "b" for k in n], hint=[k % 11 for k in n],
    )  # fmt: skip
    report = look(log)
    assert "verweildauer (AUC 1.00 by itself)" in str(report) and "outcome_text (AUC 0.9" in str(report)
    assert yaml.safe_load(report.yaml)["data"]["log"]["known_after"] == ["outcome_text", "verweildauer"]
    assert features(report)["hint"]["role"] == "context"


def test_a_log_without_times_gets_statistics_that_need_none(look: Callable):
    assert "statistics: user  # the log has no times" in look(shop_log(), "data.log.timestamp=").yaml
    assert "statistics: user" not in look(shop_log()).yaml


def test_a_column_called_feedback_does_not_hide_the_label(look: Callable):
    report = look(shop_log(feedback=["good", "bad", "none"] * 20, weekday=[f"d{k // 7}" for k in range(60)]))
    assert features(report)["feedback"] == {"role": "feedback"}
    assert "clicked: {role: condition, wish: true}  # the label, asked for as a wish" in report.yaml
    assert "weekday: {role: context}  # known when the item is ranked?" in report.yaml


def test_a_log_of_positives_gets_negatives_for_rankers(look: Callable, tmp_path: Path):
    log = shop_log(sku=[k * k % 23 for k in range(60)])
    del log["clicked"]
    report = look(log)
    assert "negatives: {per_positive: 1, sampling: matched, seed: 0}" in report.yaml
    assert "so the suggested config has data.negatives" in str(report) and "AUC is undefined" not in str(report)
    report = look({**log, "sku": [1] * 60})
    assert "negatives: {per" not in report.yaml and "(data.negatives) cannot be drawn: " in str(report)


def test_negatives_are_checked_against_features_of_the_item(look: Callable):
    log = shop_log(kind=["abcde"[k % 5] for k in range(60)])
    del log["clicked"]
    words = ["data.log.all_positive=true", "data.negatives={per_positive: 1}", "data.log={user: uid, item: sku}"]
    schema = "schema.features={item_id: {role: item}, kind: {role: context}}"
    with pytest.raises(UserError, match="schema.features.kind: with data.negatives a context must be of the moment"):
        look(log, *words, schema)


def test_what_is_known_afterwards_is_no_feature_of_the_item_in_question(look: Callable):
    """A stay that is nearly always 0 is the same for nearly every item, yet no fact about it; a duration is one."""
    n = range(600)
    log = {
        "uid": [f"u{k % 7}" for k in n],
        "sku": [k % 300 for k in n],
        "ts": [1_714_521_600 + 3600 * k for k in n],
        "clicked": [int(k % 11 == 0) for k in n],
        "stay_time": [7 if k == 5 else 0 for k in n],
        "duration": [30 + k % 300 // 6 for k in n],
        "watched": [k * 1.5 for k in n],
    }
    report = look(log)
    found = features(report)
    assert yaml.safe_load(report.yaml)["data"]["log"]["known_after"] == ["stay_time", "watched"]
    assert found["stay_time"]["role"] == "feedback"
    assert "watched" not in found
    assert found["duration"]["role"] == "item"
    assert any("known only after the item was shown: stay_time, watched" in line for line in report.warnings)
    given = look(log, "data.log.known_after=[stay_time,watched]")
    assert not any("known only after" in line for line in given.warnings)


def test_features_of_items_and_users_are_found_among_the_events(look: Callable):
    log = shop_log(
        brand=[f"b{k % 5}" for k in range(60)],
        city=[f"c{k % 6}" for k in range(60)],
        scene=[f"s{k % 7}" for k in range(60)],
        same=["x"] * 60,
        row=[f"r{k}" for k in range(60)],
        price=[k / 7 for k in range(60)],
        day=["2024-05-01"] * 30 + ["2024-05-02"] * 30,
        tags=[["a", "b"], []] * 30,
    )
    found = features(look(log))
    roles = {name: feature["role"] for name, feature in found.items()}
    assert {n: roles.get(n) for n in ("brand", "city", "scene", "price", "tags")} == {
        "brand": "item", "city": "user", "scene": "condition", "price": "context", "tags": "context"
    }  # fmt: skip
    assert found["price"]["kind"] == "dense"
    assert found["tags"]["kind"] == "multi"
    assert not {"same", "row", "day", "clicked", "uid", "sku", "ts"} & set(found)
    with_items = features(
        look(log, items={"sku": range(5), "weight": [0.1, 0.2, 0.3, 0.4, 0.5], "kind": list("abcab")})
    )
    assert with_items["brand"]["role"] == "context"  # the items' own file has no such column
    assert with_items["weight"] == {"role": "item", "kind": "dense"}
    assert with_items["kind"]["role"] == "item"


@pytest.mark.parametrize(
    ("columns", "warning"),
    [
        ({"clicked": [1] * 60}, "every event is positive"),
        ({"clicked": [0] * 60}, "every event is negative"),
        ({"uid": [f"u{k}" for k in range(60)]}, r"100% of the users have fewer than 2 events.*Is 'uid' the user"),
        ({"ts": [int(time.time()) + 10**7 + k for k in range(60)]}, "60 events lie in the future"),
        ({"ts": ["2024-05-01"] * 60, "sku": range(60)}, "dates without a time of day"),
        ({"uid": [f"u{k}" for k in range(60)] * 2 + ["u0"] * 60,
          **{name: values * 3 for name, values in shop_log().items() if name in ("sku", "clicked")},
          "ts": [1_714_521_600 + k for k in range(180)]}, None),
        ({"clicked": [None] * 30 + [0, 1] * 15}, "50.0% of the events would be quarantined, most: clicked is missing"),
        ({}, "60 events are too few"),
    ],
)  # fmt: skip
def test_warnings(look: Callable, columns: dict, warning: str | None):
    warnings = look(shop_log(**columns)).warnings
    if warning is not None:
        assert any(re.search(warning, line) for line in warnings), warnings
    sound = {"every event", "fewer than 2", "future", "time of day", "quarantined"}
    for line in warnings:
        assert warning is None or re.search(warning, line) or not any(text in line for text in sound), line


ODD = {
    "lists of lists": pl.Series([[[1, 2], [k]] for k in range(60)]),
    "arrays in lists": pl.Series([[[k, 2]] for k in range(60)], dtype=pl.List(pl.Array(pl.Int64, 2))),
    "structs": pl.Series([{"a": k, "b": "x"} for k in range(60)]),
    "structs in lists": pl.Series([[{"a": k}] for k in range(60)]),
    "bytes": pl.Series([b"abc", b"d"] * 30),
    "decimals": pl.Series([Decimal(k % 7) / 4 for k in range(60)], dtype=pl.Decimal(10, 2)),
    "durations": pl.Series([timedelta(seconds=k) for k in range(60)]),
    "durations in lists": pl.Series([[timedelta(seconds=k)] for k in range(60)]),
    "clock": pl.Series([clock(1, 2, k) for k in range(60)]),
    "categories": pl.Series(["a", "b", "c"] * 20, dtype=pl.Categorical),
    "categories in lists": pl.Series([["a", "b"], ["c"]] * 30, dtype=pl.List(pl.Categorical)),
    "nothing": pl.Series([None] * 60),
    "nothing in lists": pl.Series([[None]] * 60, dtype=pl.List(pl.Null)),
    "truths in lists": pl.Series([[True], [False, True]] * 30),
    "large numbers": pl.Series([2**63 + k % 3 for k in range(60)], dtype=pl.UInt64),
}


def test_columns_of_any_type_may_be_there(look: Callable, tmp_path: Path):
    report = look(shop_log(**ODD))
    assert {"decimals", "categories", "categories in lists"} <= {
        feature.get("column", name) for name, feature in features(report).items()
    }
    assert "lists of lists: left out: of type List(List(Int64)), which is no feature as it is" in report.yaml
    (config := tmp_path / "c.yaml").write_text(report.yaml)
    assert prepare(load(config), tmp_path / "prepared")["events"] == 60


def test_negatives_are_checked_and_kept(look: Callable, tmp_path: Path):
    log = {name: values for name, values in shop_log(sku=[k % 11 for k in range(60)]).items() if name != "clicked"}
    report = look(log, "data.log.all_positive=true", "data.negatives={per_positive: 2, seed: 3}")
    assert yaml.safe_load(report.yaml)["data"]["negatives"] == {"per_positive": 2, "sampling": "matched", "seed": 3}
    (config := tmp_path / "c.yaml").write_text(report.yaml)
    assert prepare(load(config), tmp_path / "prepared")["negatives"] == 120


def test_a_split_with_too_few_test_events_is_told_with_one_that_fits(look: Callable, tmp_path: Path, capsys):
    many = {"uid": [f"u{k % 400}" for k in range(2400)], "sku": [k % 97 for k in range(2400)]}
    many |= {"ts": [1_714_521_600 + 3600 * k for k in range(2400)], "clicked": [int(k % 3 == 0) for k in range(2400)]}
    report = look(many)
    told = str(report)
    assert re.search(r"temporal +2,000 train, 400 valid \(16.7%\), 0 test \(0.0%\) events; 0 users with test", told), (
        told
    )
    assert re.search(r"user +1,\d+ train.* users with test events  ← suggested", told)
    assert yaml.safe_load(report.yaml)["data"]["split"] == {"kind": "user"}
    assert not any("split" in warning for warning in report.warnings)
    kept = look(many, "data.split.kind=temporal", "data.split.fractions=[0.8,0.1,0.1]").warnings
    wanted = "a user needs 10 events to have one there; data.split.kind=user (whole users) or time"
    assert any(wanted in warning for warning in kept), kept
    pl.DataFrame(many).write_parquet(tmp_path / "log.parquet")
    (config := tmp_path / "c.yaml").write_text(report.yaml)
    words = [f"data.log.events={tmp_path / 'log.parquet'}", "data.split.kind=temporal"]
    result = prepare(load(config, words), tmp_path / "prepared")
    assert (result["test_events"], result["test_users"], result["valid_users"]) == (0, 0, 400)
    assert wanted in capsys.readouterr().out


def test_what_would_be_quarantined_is_what_prepare_quarantines(look: Callable, tmp_path: Path):
    log = shop_log(uid=["u"] * 58 + [None, ""], clicked=["1", "0"] * 28 + ["1", "x", "0", "1"])
    log = {name: [*values, values[0]] for name, values in log.items()}  # and one row twice
    report = look(log)
    told = str(report)
    for line in (
        "57 of 61 events",
        "2 events: uid is missing",
        "1 events: clicked is neither 0 nor 1",
        "1 events: dupl",
    ):
        assert line in told, told
    (config := tmp_path / "c.yaml").write_text(report.yaml)
    result = prepare(load(config), tmp_path / "prepared")
    assert (result["events"], result["events_read"]) == (57, 61)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
VALUES = st.sampled_from([None, "a", "b: #c", '"', "ü", "1", "2.5", "x|y", "[z]"])


@settings(max_examples=10, deadline=None)
@given(
    st.dictionaries(NAMES, st.lists(VALUES, min_size=60, max_size=60), max_size=4), st.sampled_from(["csv", "parquet"])
)
def test_the_suggested_config_prepares_whatever_the_columns_are_called(
    tmp_path_factory: pytest.TempPathFactory, columns: dict, format: str
):
    folder = tmp_path_factory.mktemp("any")
    taken = {name.lower() for name in shop_log()}
    extra = {
        name.strip(): values for name, values in columns.items() if name.strip() and name.strip().lower() not in taken
    }
    frame = pl.DataFrame({**shop_log(), **extra}, schema_overrides=dict.fromkeys(extra, pl.String))
    frame.write_csv(folder / "log.csv") if format == "csv" else frame.write_parquet(folder / "log.parquet")
    (scratch := folder / "scratch").mkdir()
    report = check.Report()
    check.check(load(None, [f"data.log.events={folder / f'log.{format}'}"]), scratch, report)
    (config := folder / "my.yaml").write_text(report.yaml)
    result = prepare(load(config), folder / "prepared")
    assert result["events"] == 60
    assert f"{result['events']} of {result['events_read']} events of {result['users']} users" in str(report)


def test_a_log_that_is_damaged_within_is_one_sentence(tmp_path: Path):
    """A Parquet file whose footer is whole and whose pages are not."""
    generator = pl.int_range(20_000, eager=True)
    frame = pl.DataFrame({"user_id": generator % 501, "item_id": generator.shuffle(1) % 300, "label": generator % 2})
    frame.with_columns(timestamp=1_714_521_600 + generator.shuffle(2)).write_parquet(path := tmp_path / "log.parquet")
    content = bytearray(path.read_bytes())
    content[3000:3200] = bytes(byte ^ 0x5A for byte in content[3000:3200])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="log.parquet cannot be read to its end"):
        check.check(load(None, [f"data.log.events={path}"]), tmp_path, check.Report())


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--check", "data.log.events=clicks.csv"], "apps/prepare.py --check data.log.events=clicks.csv"),
        (["--check", "--config", "my.yaml", "a=b"], "apps/prepare.py --check --config my.yaml a=b"),
        (["--config", "my.yaml", "--check", "a=b"], "apps/prepare.py --check --config my.yaml a=b"),
        (["--check", "True", "a=b"], "apps/prepare.py --check a=b"),
        (["--check", "False", "--config", "my.yaml"], "apps/prepare.py --config my.yaml"),
        (["--check"], "apps/prepare.py --check"),
        ([], "apps/prepare.py --config ml-1m"),
    ],
)
def test_torchx_takes_check_without_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], command: str
):
    monkeypatch.chdir(ROOT)
    run_main({"run": CmdRunFile()}, ["run", "--dryrun", "apps/prepare.py", *words])
    plain = next(line for line in capsys.readouterr().err.splitlines() if "the same without TorchX" in line)
    assert plain.endswith(f"--nproc-per-node 1 {command}")


def test_other_words_stay_as_they_are():
    assert with_values(["-j", "1x2", "--config", "x", "name=--check"]) == ["-j", "1x2", "--config", "x", "name=--check"]
