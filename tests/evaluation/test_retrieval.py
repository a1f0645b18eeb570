"""Retrieval metrics: fractions worked out by hand, ties, untrained targets, empty histories, a plain loop beside it."""

import copy
import math

import numpy as np
import pytest
import torch

from lumrec.evaluation.retrieval import (
    RetrievalConfig,
    evaluate_retrieval,
    last_events,
    metric_sums,
    target_ranks,
)
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.query.group_query import GroupQuery

MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2, max_events=8, conditions=["feedback", "scenario", "query"])
NOBODY = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def lum(tiny_prepared):
    torch.manual_seed(0)
    return build_lum(MODEL, tiny_prepared)


def ranks(scores: list[list[float]], targets: list[int], *, candidates=None, seen=()) -> list[int]:
    """Ranks for users whose similarity with item i is scores[user][i]."""
    o_BD = torch.tensor(scores)
    return target_ranks(
        o_BD,
        torch.eye(o_BD.shape[1]),
        torch.tensor(targets),
        is_candidate_I=torch.tensor(candidates or [True] * o_BD.shape[1]),
        seen_user_P=torch.tensor([user for user, _ in seen], dtype=torch.int64),
        seen_item_P=torch.tensor([item for _, item in seen], dtype=torch.int64),
    ).tolist()


def test_rank_counts_the_items_that_are_ahead():
    assert ranks([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]], [2, 2]) == [3, 2]


def test_ties_count_against_us():
    assert ranks([[1.0, 1.0, 1.0, 0.0]], [0]) == [3]
    assert ranks([[0.0] * 5], [4]) == [5]


def test_seen_items_are_left_out_for_their_user_only_and_never_the_target():
    scores = [[4.0, 3.0, 2.0], [4.0, 3.0, 2.0]]
    assert ranks(scores, [2, 2], seen=[(0, 0), (0, 1)]) == [1, 3]
    assert ranks(scores, [2, 0], seen=[(0, 2), (0, 0), (1, 0)]) == [2, 1]


def test_an_untrained_target_is_a_miss_and_untrained_items_are_not_recommended():
    assert ranks([[4.0, 3.0, 2.0]], [2], candidates=[False, True, True]) == [2]
    assert ranks([[4.0, 3.0, 2.0]], [0], candidates=[False, True, True]) == [4]  # one more than there are items


def test_a_similarity_that_is_no_number_is_a_miss():
    assert ranks([[math.nan, 1.0, 2.0]], [0]) == [3]
    assert ranks([[1.0, math.nan, 2.0]], [2]) == [3]  # one in the answer reaches every similarity


def test_sums_worked_out_by_hand():
    sums = metric_sums(torch.tensor([1, 2, 3, 4, 100]), [1, 3])
    assert sums["hr@1"] == 1 and sums["ndcg@1"] == 1
    assert sums["hr@3"] == 3
    assert sums["ndcg@3"] == pytest.approx(1 + 1 / math.log2(3) + 1 / 2)
    assert metric_sums(NOBODY, [10]) == {"hr@10": 0.0, "ndcg@10": 0.0}


def test_the_target_is_the_last_event_of_the_part(tiny_prepared):
    data = tiny_prepared
    for number, part in enumerate(("train", "valid", "test")):
        targets = last_events(data, part)
        expected = {}
        for row in range(data.num_events):
            if data.split[row] == number:
                expected[data.user[row]] = row
        assert targets.row_B.tolist() == list(expected.values())
        assert targets.first_B.tolist() == [data.user_offsets[user] for user in expected]
    sample = last_events(data, "train", max_users=7)
    assert len(set(sample.row_B.tolist())) == 7 and set(sample.row_B.tolist()) < set(
        last_events(data, "train").row_B.tolist()
    )
    assert torch.equal(last_events(data, "train", max_users=7).row_B, sample.row_B)


def test_only_the_users_asked_for_count(lum):
    model, builder = lum
    data = builder.data
    every = last_events(data, "valid")
    asked = np.zeros(data.num_users, dtype=bool)
    asked[data.user[every.row_B[:3].numpy()]] = True
    assert torch.equal(last_events(data, "valid", users=asked).row_B, every.row_B[:3])
    config = RetrievalConfig(ks=[1000])
    got = evaluate_retrieval(model, builder, part="valid", config=config, max_events=MODEL.max_events, users=asked)
    assert got["retrieval_users"] == 3


def plain_metrics(lum, part: str, condition: dict, k: int) -> dict[str, float]:
    """One user at a time, one item at a time."""
    model, builder = lum
    data = builder.data
    query = GroupQuery(model, builder, [condition], max_events=MODEL.max_events)
    e_ID = query.items()
    trained = {int(item) for item in data.item[data.split == 0]}
    hits = gains = 0.0
    targets = last_events(data, part)
    for row, first in zip(targets.row_B.tolist(), targets.first_B.tolist()):
        cut = copy.copy(data)
        cut.user_offsets = np.array([first, row])  # a log that ends before the target
        alone = GroupQuery(model, builder, [condition], max_events=MODEL.max_events)
        alone.data = cut
        o_D = alone.users(torch.tensor([0]))[0, 0]
        target, seen = int(data.item[row]), {int(item) for item in data.item[first:row]}
        score = e_ID @ o_D
        ahead = sum(
            float(score[item]) >= float(score[target]) for item in trained if item != target and item not in seen
        )
        if target in trained and ahead < k:
            hits, gains = hits + 1, gains + 1 / math.log2(2 + ahead)
    users = len(targets.row_B)
    return {f"hr@{k}": hits / users, f"ndcg@{k}": gains / users, "retrieval_users": users}


@pytest.mark.parametrize("condition", [{}, {"feedback": "like"}, {"feedback": "dislike", "scenario": "search"}])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_lum_is_measured_as_by_a_plain_loop(lum, part, condition):
    model, builder = lum
    config = RetrievalConfig(condition=condition, ks=[20], tokens_per_pack=100)
    got = evaluate_retrieval(model, builder, part=part, config=config, max_events=MODEL.max_events)
    expected = plain_metrics(lum, part, condition, 20)
    assert 0 < expected["hr@20"] < 1
    assert got == pytest.approx(expected)


def test_the_oracle_stands_beside_the_honest_figures(lum):
    model, builder = lum
    arguments = {"part": "test", "max_events": MODEL.max_events}
    honest = evaluate_retrieval(model, builder, config=RetrievalConfig(ks=[5, 30]), **arguments)
    both = evaluate_retrieval(model, builder, config=RetrievalConfig(ks=[5, 30], oracle=True), **arguments)
    assert {name: value for name, value in both.items() if not name.startswith("oracle/")} == pytest.approx(honest)
    assert {name for name in both if name.startswith("oracle/")} == {
        f"oracle/{metric}@{k}" for metric in ("hr", "ndcg") for k in (5, 30)
    }
    assert both["oracle/ndcg@30"] != both["ndcg@30"]


def test_the_oracle_asks_with_the_conditions_of_the_target(lum):
    """Where every event has one condition, asking with the true one is asking with that one."""
    model, builder = lum
    data = copy.copy(builder.data)
    data.event_columns = dict(data.event_columns)
    rows = {name: data.vocabulary(name)[value] for name, value in {"feedback": "like", "scenario": "home"}.items()}
    for name, row in rows.items():
        data.event_columns[name] = data.event_columns[name]._replace(values=torch.full((data.num_events,), row))
    no_query = torch.zeros(data.num_events + 1, dtype=torch.int64)
    data.event_columns["query"] = data.event_columns["query"]._replace(values=NOBODY, offsets=no_query)
    same = builder.of_other_events(data)
    config = RetrievalConfig(condition={"feedback": "like", "scenario": "home"}, ks=[20], oracle=True)
    got = evaluate_retrieval(model, same, part="valid", config=config, max_events=MODEL.max_events)
    assert got["oracle/hr@20"] == got["hr@20"] and got["oracle/ndcg@20"] == pytest.approx(got["ndcg@20"])


def test_a_user_without_history_is_asked_from_the_condition_alone(lum):
    """The target is the user's only event: all such users get the same answer, and count."""
    model, builder = lum
    data = copy.copy(builder.data)
    data.split = np.full(data.num_events, 0, np.int8)
    data.split[data.user_offsets[:-1]] = 2
    alone = builder.of_other_events(data)
    got = evaluate_retrieval(
        model, alone, part="test", config=RetrievalConfig(ks=[data.num_items]), max_events=MODEL.max_events
    )
    trained = np.isin(data.item[data.user_offsets[:-1]], np.flatnonzero(data.item_counts))
    assert got["retrieval_users"] == data.num_users and got[f"hr@{data.num_items}"] == trained.mean()


def test_the_model_is_left_in_the_mode_it_came_in(lum):
    model, builder = lum
    for training in (True, False):
        model.train(training)
        evaluate_retrieval(model, builder, part="valid", config=RetrievalConfig(), max_events=MODEL.max_events)
        assert model.training is training


def test_errors_say_what_is_wrong(lum):
    model, builder = lum
    with pytest.raises(ValueError, match="expected one of"):
        last_events(builder.data, "tset")
    data = copy.copy(builder.data)
    data.split = np.zeros(data.num_events, np.int8)
    with pytest.raises(ValueError, match="no event of these users is in the part 'valid'"):
        last_events(data, "valid")
    with pytest.raises(ValueError, match="did you mean 'like'"):
        evaluate_retrieval(
            model, builder, part="valid", config=RetrievalConfig(condition={"feedback": "likee"}), max_events=8
        )
