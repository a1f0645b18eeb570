"""Rows drawn beside the events of a log of positives: of items the user never met; they change nothing else."""

import copy

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumrec.batches.rows import RowBuilder, training_rows
from lumrec.data import prepare
from lumrec.data.drawn_rows import NegativeRows, NegativeRowsConfig
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import PARTS, TEST, TRAIN
from lumrec.experiments.config import load
from lumrec.features import statistics
from lumrec.features.statistics import dense_inputs, raw_statistics
from lumrec.knowledge.store import Knowledge
from lumrec.metrics.ranking import auc
from lumrec.stages.registry import STAGES

NUM_ITEMS = 30
YAML = """
data:
  source: log
  log: {{events: {folder}/bought.parquet, items: {folder}/items.parquet, all_positive: true}}
  split: {{kind: leave_one_out}}
schema:
  features:
    item_id: {{role: item}}
    tags: {{role: item, kind: multi}}
    price: {{role: item, kind: dense}}
    page: {{role: condition}}
    tag: {{role: condition, table: tags, wish: true}}
    weekday: {{role: context}}
"""
WORDS = [
    "name=bought",
    "model.dim=8",
    "model.num_layers=1",
    "model.max_events=8",
    "model.conditions=[tag]",
    "pretrain.packing.events_per_pack=128",
    "pretrain.train.max_steps=3",
    "query.conditions=[{}, {tag: top 1}]",
    "rank.hidden_dims=[8]",
    "rank.batch_size=64",
    "rank.train.epochs=1",
]
ONE_EACH = "data.negatives={per_positive: 1, sampling: uniform}"
TWO_EACH = "data.negatives={per_positive: 2, seed: 5, sampling: uniform}"


@pytest.fixture(scope="module")
def bought(tmp_path_factory: pytest.TempPathFactory):
    """Makes the prepared folder of a small log of purchases in runs of its own: words -> PreparedData."""
    folder, rng = tmp_path_factory.mktemp("bought"), np.random.default_rng(0)
    lengths = [0, 1, 2, 20, *rng.integers(3, 12, 30)]
    user, count = np.repeat(np.arange(len(lengths)), lengths), sum(lengths)
    item = np.minimum(rng.geometric(0.1, count) - 1, NUM_ITEMS - 1)
    tags = [[f"t{item % 4}", *(["new"] if item % 3 else [])] for item in range(NUM_ITEMS)]
    events = {"user_id": user, "item_id": item, "timestamp": 1_700_000_000 + rng.integers(0, 9 * 86400, count)}
    events |= {"page": rng.choice(["home", "search"], count), "tag": [tags[i][0] for i in item]}
    pl.DataFrame(events).write_parquet(folder / "bought.parquet")
    pl.DataFrame({"item_id": range(NUM_ITEMS), "tags": tags, "price": rng.random(NUM_ITEMS)}).write_parquet(
        folder / "items.parquet"
    )
    (folder / "bought.yaml").write_text(YAML.format(folder=folder))

    def make(*words: str) -> PreparedData:
        runs = tmp_path_factory.mktemp("runs")
        config = load(folder / "bought.yaml", [*WORDS, *words, f"runs_dir={runs}"])
        STAGES["prepare"].run(config)
        return PreparedData.open(runs / "bought-prepare")

    make.config = folder / "bought.yaml"
    return make


@pytest.fixture(scope="module")
def data(bought) -> PreparedData:
    return bought(TWO_EACH)


def test_no_drawn_item_is_anywhere_in_the_users_log(data: PreparedData):
    user_N = data.user[data.negative_event]
    met = set(zip(data.user.tolist(), data.item.tolist()))
    assert not met & set(zip(user_N.tolist(), data.negative_item.tolist()))
    assert data.negative_event.tolist() == np.repeat(np.arange(data.num_events), 2).tolist()
    assert (data.item_counts[data.negative_item] > 0).all()  # what no training event has, no ranker knows
    assert len(np.unique(data.negative_item)) > 20


def test_the_draws_depend_on_the_seed_alone(bought, data: PreparedData):
    again, other = bought(TWO_EACH), bought("data.negatives={per_positive: 2, seed: 6, sampling: uniform}")
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert not np.array_equal(other.negative_item, data.negative_item)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    histories=st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=4),
)
@example(weights=[1], histories=[[0], []])
def test_every_place_is_the_item_that_a_list_has_there(weights: list[int], histories: list[list[int]]):
    """All places of each user, against a list of what the user's own items leave, each as often as it weighs."""
    weights = [1, *weights]  # item 0 is nobody's, so that something is left
    histories = [[1 + item % (len(weights) - 1) for item in items] for items in histories]
    histories = [items for items in histories if items]  # users without events are in no block
    if not histories:
        return
    left = [
        [item for item, weight in enumerate(weights) if item not in items for _ in range(weight)] for items in histories
    ]
    drawn = NegativeRows(NegativeRowsConfig(sampling="popularity"), np.array(weights), pl.Series([]))
    user_E = np.repeat(np.arange(len(histories)), [len(items) for items in histories]) + 7
    user_N = np.repeat(np.arange(len(left)), [len(items) for items in left]) + 7
    share_N = np.concatenate([(np.arange(len(items)) + 0.5) / len(items) for items in left])
    got = drawn._draw(user_E, np.concatenate(histories).astype(np.int64), user_N, share_N)
    assert got.tolist() == [item for items in left for item in items]


@pytest.mark.parametrize("sampling", ["matched", "uniform", "popularity"])
def test_blocks_do_not_matter(data: PreparedData, sampling: str, tmp_path):
    columns = {"user": data.user, "item": data.item, "order": data.order, "label": data.label, "split": data.split}
    columns |= {"timestamp": data.timestamp, "rows_back": np.arange(data.num_events) - data.before}
    pl.DataFrame(columns).write_parquet(tmp_path / "block.parquet")
    config = NegativeRowsConfig(per_positive=3, sampling=sampling)
    cut = int(data.user_offsets[10])
    parts = []
    for blocks in ([slice(None)], [slice(None, cut), slice(cut, None)]):
        drawn = NegativeRows(config, data.item_counts, pl.Series(data.user_keys()), [tmp_path / "block.parquet"])
        parts.append(pl.concat([drawn.add(pl.DataFrame(columns)[block]) for block in blocks]))
        assert drawn.num_rows == 3 * data.num_events
    assert parts[0].equals(parts[1])


def test_popular_items_are_drawn_as_often_as_they_are_bought(bought):
    data = bought("data.negatives={per_positive: 200, sampling: popularity}")
    user_N, expected_I = data.user[data.negative_event], np.zeros(data.num_items)
    for user in range(data.num_users):
        left_I = data.item_counts.astype(float)
        left_I[data.item[data.user == user]] = 0
        expected_I += (user_N == user).sum() * left_I / left_I.sum()
    np.testing.assert_allclose(np.bincount(data.negative_item, minlength=data.num_items), expected_I, rtol=0.1, atol=60)


def test_nothing_else_is_changed_by_them(bought, data: PreparedData):
    """Not the events, items, users and vocabularies (to the byte), what a LUM reads, or an event's statistics."""
    plain = bought()
    files, drawn = plain.manifest["files"], data.manifest["files"]
    assert {
        name: facts for name, facts in drawn.items() if not name.startswith(("negatives/", "mapped/negative-"))
    } == files
    assert "negatives/part-00000.parquet" in drawn and plain.num_rows == plain.num_events
    assert data.vocabulary_fingerprint == plain.vocabulary_fingerprint
    assert np.array_equal(training_rows(data, None), training_rows(plain, None))
    assert np.array_equal(dense_inputs(data).values_RF[: data.num_events], dense_inputs(plain).values_RF)


def test_in_parts_of_users_drawn_rows_stay_beside_their_events(data: PreparedData, monkeypatch):
    whole = dense_inputs(data).values_RF
    monkeypatch.setattr(statistics, "PART_EVENTS", 50)
    np.testing.assert_allclose(dense_inputs(data).values_RF, whole, rtol=0, atol=2e-6)


def test_a_drawn_row_has_the_statistics_of_an_event_with_its_item(data: PreparedData):
    columns = raw_statistics(data)
    for number in np.random.default_rng(0).choice(len(data.negative_event), 25, replace=False):
        event, replaced = data.negative_event[number], copy.copy(data)
        replaced.item = data.item.copy()
        replaced.item[event] = data.negative_item[number]
        expected = raw_statistics(replaced)
        for name, column in columns.items():
            assert column[data.num_events + number] == pytest.approx(expected[name][event], abs=1e-9), name


def test_a_drawn_row_differs_from_its_event_in_the_item_alone(data: PreparedData):
    statistics = dense_inputs(data, kind="all")
    builder = RowBuilder(
        data,
        features=["page", "weekday", "item_id", "tags"],
        row_features=["page", "weekday"],
        max_history=5,
        statistics=statistics,
        reads=["age_T", "item_U"],
    )
    events = np.random.default_rng(1).choice(data.num_events, 40, replace=False)
    rows = data.with_negatives(events)
    drawn = rows[len(events) :]
    assert sorted(data.negative_event[drawn - data.num_events]) == sorted([*events, *events])
    of_event = data.negative_event[drawn - data.num_events]
    mine, theirs = builder.batch(drawn), builder.batch(of_event)
    assert torch.equal(mine.offsets_B1, theirs.offsets_B1) and torch.equal(mine.age_T, theirs.age_T)
    assert torch.equal(mine.item_U[mine.history_T], theirs.item_U[theirs.history_T])
    for name in ("page", "weekday"):
        values = [batch.tokens[name].to_dense()[-len(drawn) :] for batch in (mine, theirs)]
        assert [value.tolist() for value in values[0]] == [value.tolist() for value in values[1]]
    assert mine.item_U[mine.target_B].tolist() == data.negative_item[drawn - data.num_events].tolist()
    assert theirs.item_U[theirs.target_B].tolist() == data.item[of_event].tolist()
    assert mine.label_B.tolist() == [0.0] * len(drawn) and theirs.label_B.tolist() == [1.0] * len(drawn)
    of_user = [place for place, name in enumerate(statistics.names) if name.startswith(("log_", "like_", "excess"))]
    assert len(of_user) == 10 and torch.equal(mine.dense_BF[:, of_user], theirs.dense_BF[:, of_user])


def test_popularity_is_told(data: PreparedData):
    rows = data.rows(data.with_negatives(np.flatnonzero(data.split == TEST)))
    told = data.manifest["facts"]["popularity_auc"]
    assert told == pytest.approx(auc(rows.label, data.item_counts[rows.item]), abs=1e-12)
    assert data.manifest["counts"]["negatives"] == len(data.negative_item)


def test_rankers_and_answers_are_measured_on_both(bought):
    data = bought(ONE_EACH)
    words = [*WORDS, ONE_EACH, f"runs_dir={data.path.parent}"]
    STAGES["pretrain"].run(load(bought.config, words))
    answers = STAGES["query"].run(load(bought.config, words))
    result = STAGES["rank"].run(load(bought.config, [*words, "rank.knowledge=both"]))
    num_test = int((data.split == TEST).sum())
    assert result["num_rows"] == 2 * num_test and 0.0 <= result["auc"] <= 1.0
    knowledge = Knowledge.open(data.path.parent / "bought-query", data)
    of_answers = knowledge.for_rows(np.flatnonzero(data.split == PARTS.index("test")))
    assert of_answers.present_BN.all()
    rows = data.rows(data.with_negatives(np.flatnonzero(data.split == TEST)))
    answered = knowledge.for_rows(rows.event)  # asked with no condition first: the other one is not its opposite
    e_BD = knowledge.items_e[answered.fold_B, torch.from_numpy(rows.item)].float()
    similarity_B = (answered.o_BND[:, 0] * e_BD).sum(1)
    assert answers["test/lum_auc"] == pytest.approx(auc(rows.label, similarity_B.double().numpy()), abs=1e-3)
    plain = training_rows(data, knowledge)
    assert len(data.with_negatives(plain)) == 2 * (data.split == TRAIN).sum()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.negatives.per_positive=0"], "per_positive: got 0, expected at least 1"),
        (["data.negatives.sampling=even"], "data.negatives.sampling: got 'even', expected one of matched, uniform"),
        ([ONE_EACH, "schema.features.tag.wish=false"], "features.tag: .* condition must be of the moment.*wish: true"),
        ([ONE_EACH, "data.log.all_positive=false", "data.label={column: tag, values: [t1]}"], "have label 0"),
        (["data.negatives.per_item=1"], "unknown key 'data.negatives.per_item'; the nearest .*negatives.per_positive"),
        (["data.negatives.seed=x"], "data.negatives.seed: got 'x', expected int"),
    ],
)
def test_what_cannot_be_drawn_is_told(bought, words: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        bought(*words)


def test_a_user_who_has_met_everything():
    columns = {"user": [3, 3], "item": [0, 1], "order": [0, 1], "label": [1.0, 1.0], "split": [TRAIN, TRAIN]}
    columns |= {"timestamp": [1, 2], "rows_back": [0, 0]}
    drawn = NegativeRows(NegativeRowsConfig(), np.array([1, 1, 0]), pl.Series(["a", "b", "c", "d"]))
    with pytest.raises(ValueError, match="the user 'd' has events of every item of the training split"):
        drawn.add(pl.DataFrame(columns))


def test_no_section_is_no_negatives(bought):
    assert load(None, []).data.negatives is None
    assert load(None, ["data.negatives.seed=3"]).data.negatives == NegativeRowsConfig(seed=3)
    assert load(bought.config, [TWO_EACH, "data.negatives=null"]).data.negatives is None
    assert "negatives" not in bought().manifest["request"]["data"]


def news() -> dict:
    """Items that appear while the log runs and are read for some days: those of the last days are not in training."""
    rng, num_items = np.random.default_rng(0), 600
    born = np.sort(rng.uniform(-5, 60, num_items))
    time = np.sort(rng.uniform(0, 60, 6000))
    popular = rng.permutation(1 / np.arange(1, num_items + 1) ** 0.8)
    weight = popular * np.exp(-(time[:, None] - born) / 2) * (born <= time[:, None])
    cumulative = weight.cumsum(1)
    item = (cumulative < rng.random((6000, 1)) * cumulative[:, -1:]).sum(1)
    return {"user_id": rng.integers(0, 150, 6000), "item_id": item, "timestamp": 1_700_000_000 + 86_400 * time}


def sessions() -> dict:
    """Six of ten events are of an item that the user had before."""
    rng, rows = np.random.default_rng(1), []
    popular = 1 / np.arange(1, 501)
    fresh = iter(rng.choice(500, 6000, p=popular / popular.sum()))
    for user in range(120):
        had: list[int] = []
        for moment in np.sort(rng.uniform(0, 60, 50)):
            had.append(had[rng.integers(len(had))] if had and rng.random() < 0.6 else int(next(fresh)))
            rows.append((user, had[-1], 1_700_000_000 + 86_400 * moment))
    return dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows)), strict=True))


@pytest.mark.parametrize(("make", "split"), [(news, "time"), (news, "temporal"), (sessions, "time")])
def test_matched_draws_tell_nothing(make, split: str, tmp_path, capsys):
    """Not by popularity, by what training has not seen, or by what the user had before; uniform draws do, and warn."""
    frame = pl.DataFrame(make()).with_columns(pl.col("timestamp").cast(pl.Int64))
    frame.write_parquet(tmp_path / "log.parquet")
    words = ["data.source=log", f"data.log.events={tmp_path / 'log.parquet'}", "data.log.all_positive=true"]
    words += ["schema.features={item_id: {role: item}}", f"runs_dir={tmp_path}", f"data.split.kind={split}"]
    told = {}
    for sampling in ("matched", "uniform"):
        config = load(None, [*words, f"data.negatives.sampling={sampling}"])
        told[sampling] = (prepare.prepare(config, tmp_path / sampling), capsys.readouterr().out)
    result, text = told["matched"]
    data = PreparedData.open(tmp_path / "matched")
    for part in PARTS:
        assert 0.45 < result[f"{part}_popularity_auc"] < 0.55, part
        for what in ("unseen", "repeated"):
            shares = [result[f"{part}_{what}_{kind}"] for kind in ("positives", "negatives")]
            assert shares[1] == pytest.approx(shares[0], abs=0.1), (part, what)
    assert "apart" not in text and "are told by" not in text
    counts = raw_statistics(data)["item_log_count"]
    rows = data.with_negatives(np.flatnonzero(data.split == TRAIN))
    assert 0.45 < auc(data.rows(rows).label, counts[rows]) < 0.55  # of what is counted before the row
    result, text = told["uniform"]
    assert not 0.45 < result["test_popularity_auc"] < 0.55
    assert "drawn rows of the test split can be recognised by popularity" in text and "sampling=matched" in text
    assert "the user had before are" in text or make is not sessions


def test_matched_draws_are_of_what_the_user_had_or_never_meets(bought):
    data = bought("data.negatives={per_positive: 3}")
    for number, event in enumerate(data.negative_event):
        first, item = data.user_offsets[data.user[event]], data.negative_item[number]
        of_user = data.item[data.user == data.user[event]]
        earlier = data.item[first : data.before[event]]
        assert item != data.item[event]
        assert (item in earlier and data.item[event] in earlier) or item not in of_user
