"""Conditions from words to queries: values that stand for several, the user's own, and those of a request."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.batches.windows import Windows
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import ModelConfig, build_lum, load_lum
from lumrec.query.conditions import Conditions, expand, top_values
from lumrec.query.group_query import GroupQuery
from lumrec.stages.registry import STAGES

MAX_EVENTS = 8


@pytest.fixture(scope="module")
def lum(tiny_prepared):
    torch.manual_seed(0)
    return build_lum(ModelConfig(dim=16, num_layers=1, max_events=MAX_EVENTS), tiny_prepared)


def make_query(lum, conditions, **settings) -> GroupQuery:
    return GroupQuery(*lum, conditions, max_events=MAX_EVENTS, **settings)


def test_a_star_is_each_value_that_was_seen_the_most_frequent_first(lum):
    data, features = lum[1].data, lum[1].condition_features
    asked = [condition["category"] for condition in expand(data, features, [{"category": "*"}])]
    rows = data.event_columns["category"].values.numpy()[data.split == 0]
    known = data.vocabulary("categories")
    assert {known[value] for value in asked} == set(rows.tolist()) - {0}
    counts = [int((rows == known[value]).sum()) for value in asked]
    assert counts == sorted(counts, reverse=True)


def test_products_are_every_combination_up_to_the_cap(lum):
    data, features = lum[1].data, lum[1].condition_features
    both = expand(data, features, [{"feedback": "*", "scenario": "*"}, {}])
    assert len(both) == 2 * 3 + 1
    assert len({tuple(sorted(condition.items())) for condition in both}) == 7
    with pytest.raises(ValueError, match=r"makes 7 conditions, and query.max_conditions is 6 .*'\*'.* makes 6"):
        expand(data, features, [{"feedback": "*", "scenario": "*"}, {}], max_conditions=6)
    assert expand(data, features, both) == both
    with pytest.raises(ValueError, match="asks {'feedback': 'like'} twice"):
        expand(data, features, [{"feedback": "*"}, {"feedback": "like"}])


def test_top_of_the_history_is_a_slot_for_each_place(lum):
    data, features = lum[1].data, lum[1].condition_features
    slots = expand(data, features, [{"category": "top 2", "feedback": "*"}])
    assert {slot["category"] for slot in slots} == {"top 1 of 2", "top 2 of 2"}
    assert expand(data, features, slots) == slots
    for bad in ("top 0", "top 3 of 2"):
        with pytest.raises(ValueError, match="expected"):
            make_query(lum, [{"category": bad}])


@settings(max_examples=60, deadline=None)
@given(
    histories=st.lists(st.lists(st.lists(st.integers(0, 4), max_size=2), max_size=9), min_size=1, max_size=5),
    k=st.integers(1, 6),
)
def test_top_values_equal_counting_by_hand(histories, k):
    bags = [bag for history in histories for bag in history]
    lengths = torch.tensor([len(history) for history in histories])
    column = Column(
        torch.tensor([value for bag in bags for value in bag], dtype=torch.int64),
        torch.tensor([0, *np.cumsum([len(bag) for bag in bags], dtype=np.int64)]),
    )
    windows = Windows(lengths.cumsum(0) - lengths, lengths, torch.arange(len(histories)))
    asked = [(w, moment) for w, history in enumerate(histories) for moment in range(len(history) + 1)]
    window_R, moment_R = torch.tensor(asked).T
    expected = []
    for w, moment in asked:
        seen = [value for bag in histories[w][:moment] for value in bag if value]
        last = {value: place for place, bag in enumerate(histories[w][:moment]) for value in bag}
        order = sorted(Counter(seen).items(), key=lambda item: (-item[1], -last[item[0]]))
        expected.append(([value for value, _ in order] + [0] * k)[:k])
    found = top_values(column, windows, window_R, moment_R, k=k).tolist()
    for (w, moment), got, right in zip(asked, found, expected):
        last = {value: place for place, bag in enumerate(histories[w][:moment]) for value in bag}
        # Two values of one event that are equally frequent may come in either order.
        assert [(last.get(v), v == 0) for v in got] == [(last.get(v), v == 0) for v in right]
        assert len(set(got) - {0}) == len([v for v in got if v])


def test_the_users_own_values_are_asked_and_told(lum):
    query, users = make_query(lum, [{"category": "top 2"}, {"feedback": "like"}]), torch.tensor([0, 3, 7])
    o_BND = query.users(users)
    names = {row: value for value, row in query.data.vocabulary("categories").items()}
    own = []
    for user in users.tolist():
        end = query.data.user_offsets[user + 1]
        rows = query.data.event_columns["category"].values[max(query.data.user_offsets[user], end - 7) : end].tolist()
        last = {row: place for place, row in enumerate(rows)}
        best = sorted(Counter(rows).items(), key=lambda item: (-item[1], -last[item[0]]))[:2]
        own.append([{"category": names[row]} for row, _ in best] + [{}] * (2 - len(best)) + [{"feedback": "like"}])
    given_by_hand = query.ask([query.data.user_keys()[user] for user in users.tolist()], own)
    torch.testing.assert_close(o_BND, given_by_hand, atol=2e-5, rtol=0)
    nobody = Windows(torch.tensor([0]), torch.tensor([0]), users[:1])
    told = query.asked.spelled(nobody, *torch.zeros(2, 1).long(), history_W=torch.tensor([0]))
    assert told == [{}, {}, {"feedback": "like"}]  # nobody's history has no values of its own


def test_own_values_of_a_row_are_those_before_it(lum):
    query = make_query(lum, [{"category": "top 1"}])
    user = int(np.argmax(np.diff(query.data.user_offsets)))
    row_R, o_RND = query.rows(torch.tensor([user]))
    start = query.data.user_offsets[user]
    for place in (0, 4):  # before these rows stand 1 and 5 events, all in the first window
        row = int(row_R[place])
        seen = query.data.event_columns["category"].values[start:row].tolist()
        last = {value: index for index, value in enumerate(seen)}
        value = max(Counter(seen).items(), key=lambda item: (item[1], last[item[0]]))[0]
        names = {row: name for name, row in query.data.vocabulary("categories").items()}
        history = Windows(torch.tensor([start]), torch.tensor([row - start]), torch.tensor([user]))
        alone = query.ask(history, [{"category": names[value]}])
        torch.testing.assert_close(o_RND[place], alone[0], atol=2e-5, rtol=0)


def test_a_request_gives_its_conditions(lum):
    data = lum[1].data
    query, keys = make_query(lum, [{}]), data.user_keys()[:3]
    words = list(data.vocabulary("query"))[:2]
    shared = query.ask(keys, [{"query": words[0]}, {"feedback": "like", "scenario": "search"}])
    users = make_query(lum, [{"query": words[0]}, {"feedback": "like", "scenario": "search"}]).users(torch.arange(3))
    torch.testing.assert_close(shared, users, atol=0, rtol=0)
    own = query.ask(keys, [[{"query": words[0]}], [{"query": "|".join(words)}], [{}]])
    torch.testing.assert_close(own[0, 0], shared[0, 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(own[2], query.users(torch.tensor([2]))[0], atol=2e-5, rtol=0)
    new = query.ask(keys, [{"query": "nosuchword"}], unknown_as_zero=True)
    assert torch.isfinite(new).all()
    with pytest.raises(ValueError, match="'nosuchword' does not occur"):
        query.ask(keys, [{"query": "nosuchword"}])
    with pytest.raises(ValueError, match="2 lists of .1. conditions are given for 3 users"):
        query.ask(keys, [[{}], [{}]])
    with pytest.raises(ValueError, match="holds no user 'nobody'; the nearest of its 120 are"):
        query.ask(["nobody"], [{}])
    with pytest.raises(ValueError, match="sees up to 7 before a query"):
        query.ask(Windows(*(torch.tensor([n]) for n in (0, 8, 0))), [{}])


def test_a_value_of_the_vocabulary_is_itself(lum):
    class Named:  # the same data, but a scenario is called "top 3"
        def __init__(self, data):
            self.__dict__.update(vars(data))

        def vocabulary(self, table):
            return {"top 3": 1, "home": 2}

    data = Named(lum[1].data)
    assert expand(data, ["scenario"], [{"scenario": "top 3"}]) == [{"scenario": "top 3"}]
    assert Conditions(data, ["scenario"], [{"scenario": "top 3"}]).top_ranks == {}


def test_the_stage_stores_each_slot(experiment):
    """What is stored for "top 1 of 2" at a row is the answer to the user's own value, as it was before that row."""
    config = experiment("query.conditions=[{category: top 2}, {feedback: '*'}]", "query.users=false")
    assert STAGES["query"].run(config)["conditions"] == 4
    data = PreparedData.open(Path(config.runs_dir) / "tiny-prepare")
    knowledge = Knowledge.open(Path(config.runs_dir) / "tiny-query", data)
    assert knowledge.conditions[:2] == [{"category": "top 1 of 2"}, {"category": "top 2 of 2"}]
    dmp, builder, _ = load_lum(config.runs / "tiny-pretrain", data, device=torch.device("cpu"))
    start = int(data.user_offsets[5])
    names = {row: name for name, row in data.vocabulary("categories").items()}
    own = names[int(data.event_columns["category"].values[start])]
    query = GroupQuery(dmp, builder, [{}], max_events=16)
    alone = query.ask(Windows(*(torch.tensor([n]) for n in (start, 1, 5))), [{"category": own}, {}])
    stored = knowledge.for_rows(torch.tensor([start + 1])).o_BND
    torch.testing.assert_close(stored[:, :2], alone, atol=5e-3, rtol=0)  # float16; no second value yet: without
