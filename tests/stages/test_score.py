"""lumrec score: a Parquet table of rows of the log, scored by a bundle with the states of its users."""

import os
import signal

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from lumrec.experiments.config import load
from lumrec.models.ranker import open_ranker_run, plain_ranker
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json
from lumrec.serving.golden import row_requests
from lumrec.serving.scorer import Scorer
from lumrec.stages import score
from lumrec.stages.registry import STAGES


@pytest.fixture
def table(served, tmp_path):
    """Events of the log as a table in the file `input`, with the states of their users, and what the Scorer says."""
    STAGES["user_state"].run(load(None, served.words))
    row_builder = plain_ranker(open_ranker_run(served.runs / "tiny-rank"))[1]
    scorer = Scorer.open(served.bundle, store=served.store, state=served.runs / "tiny-rank-user_state")
    rows = np.random.default_rng(0).permutation(row_builder.data.num_events)[:300]
    requests = row_requests(row_builder, scorer.bundle.builder, rows)
    columns = {"user": [each.user for each in requests], "item": [each.items[0] for each in requests]}
    columns["shown_at"] = [each.time for each in requests]
    columns |= {name: [each.context[name] for each in requests] for name in requests[0].context}
    frame = pl.DataFrame(columns).with_columns(extra=pl.lit("not read"))
    frame.write_parquet(tmp_path / "input.parquet", row_group_size=130)
    expected = np.array([each.scores[0] for each in scorer.score_many(requests)])
    words = [*served.words, f"score.input={tmp_path / 'input.parquet'}", "score.time=shown_at"]
    words += ["score.store=tiny-query", "score.state=tiny-rank-user_state"]
    return words, frame, expected


def test_a_table_is_scored_in_its_order_by_two_processes(table, served):
    words, frame, expected = table
    result = STAGES["score"].run(load(None, [*words, "run=two", "score.processes=2", "score.rows_per_part=70"]))
    scored = pl.read_parquet(result["output"])
    assert scored.columns == ["user", "item", "shown_at", *score.SCORES.names]
    assert scored.select("user", "item", "shown_at").equals(frame.select("user", "item", "shown_at"))
    np.testing.assert_allclose(scored["score"], expected, rtol=0, atol=1e-6)
    assert result["rows"] == 300 and result["users_unknown"] == result["items_unknown"] == 0
    assert result["without_knowledge"] == int(scored["knowledge_age_s"].is_nan().sum())
    assert not (served.runs / "two/parts").exists() and read_json(served.runs / "two/result.json")["rows"] == 300


def test_rows_of_one_user_and_time_share_a_request_and_score_the_same(table, served, monkeypatch):
    words, frame, _ = table
    one = frame.head(1).select("user", "shown_at")
    page = frame.head(40).drop("user", "shown_at").join(one, how="cross")
    page.write_parquet(served.runs / "page.parquet")
    calls, score_many = [], Scorer.score_many
    monkeypatch.setattr(
        Scorer, "score_many", lambda self, requests: calls.append(requests) or score_many(self, requests)
    )
    words = [*words, f"score.input={served.runs / 'page.parquet'}", "run=page", "score.processes=1"]
    scored = pl.read_parquet(STAGES["score"].run(load(None, words))["output"])
    assert [len(each.items) for each in calls[0]] == [40]
    monkeypatch.undo()
    scorer = Scorer.open(served.bundle, store=served.store, state=served.runs / "tiny-rank-user_state")
    context = page.drop("user", "item", "shown_at", "extra").to_dicts()
    for row, item in enumerate(page["item"]):
        alone = scorer.score(one["user"][0], [item], context[row], one["shown_at"][0])
        assert abs(alone[0] - scored["score"][row]) <= 1e-6


def test_unknown_keys_and_a_table_without_context_are_scored_and_counted(table, served):
    words, frame, _ = table
    rows = frame.head(6).select("user", pl.lit("gone").alias("item"))
    rows = pl.concat([rows, pl.DataFrame({"user": ["nobody", None], "item": frame["item"][:2]})])
    rows.write_parquet(served.runs / "unknown.parquet")
    words = [
        *words,
        f"score.input={served.runs / 'unknown.parquet'}",
        "score.time=",
        "run=unknown",
        "score.processes=1",
    ]
    result = STAGES["score"].run(load(None, words))
    assert (result["rows"], result["users_unknown"], result["items_unknown"]) == (8, 2, 6)
    assert pl.read_parquet(result["output"])["score"].is_finite().all()


def score_until_killed(words: list[str]) -> None:
    score_part = score._score_part

    def until_killed(folder, settings, columns, part):
        if part.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_part(folder, settings, columns, part)

    score._score_part = until_killed
    STAGES["score"].run(load(None, words))


def test_a_killed_run_continues_with_the_parts_that_are_left(table, served, forks):
    words, _, expected = table
    words = [*words, "run=killed", "score.processes=1", "score.rows_per_part=20"]
    killed = forks.start("tests.stages.test_score:score_until_killed", words=words)
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    parts = sorted(file.name for file in (served.runs / "killed/parts").iterdir())
    assert parts == [f"{number:06}.parquet" for number in range(5)]
    before = (served.runs / "killed/parts/000000.parquet").stat().st_mtime_ns
    scored, join = [], score._join

    def looked_at(folder, parts, output):
        scored.append((folder / "000000.parquet").stat().st_mtime_ns)
        return join(folder, parts, output)

    score._join = looked_at
    try:
        result = STAGES["score"].run(load(None, words))
    finally:
        score._join = join
    assert scored == [before]
    np.testing.assert_allclose(pq.read_table(result["output"])["score"].to_numpy(), expected, rtol=0, atol=1e-6)
    assert STAGES["score"].run(load(None, words))["rows"] == 300  # finished: kept


def test_what_cannot_be_scored_is_an_error_that_names_it(table, served, tmp_path):
    words, frame, _ = table
    for word, error, why in [
        ("score.input=", UserError, "score.input is empty"),
        (f"score.input={tmp_path / 'no.parquet'}", MissingFileError, "no Parquet file at"),
        ("score.user=usr", UserError, "score.user: .* no column 'usr'"),
        ("score.bundle=no", MissingFileError, "no bundle in"),
        ("score.time=extra", UserError, "expected times"),
        ("score.state=no", MissingFileError, "no user state"),
    ]:
        with pytest.raises(error, match=why):
            STAGES["score"].run(load(None, [*words, "run=wrong", "overwrite=true", "score.processes=1", word]))
