"""Group query: equal to asking one by one, blind to other queries, to what comes later and to other users."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.batches.packs import Queries
from lumrec.batches.windows import Windows, behind
from lumrec.data.columns import Column
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.modules import large_user_model as lum_module
from lumrec.modules.user_encoder import ENCODERS
from lumrec.query.conditions import condition_columns, default_conditions
from lumrec.query.group_query import GroupQuery, answered_rows, encode_items, packs, row_windows, serving_windows

MODEL = ModelConfig(dim=16, num_layers=2, num_heads=2, max_events=8)
CONDITIONS = [{"feedback": "like"}, {}, {"feedback": "dislike", "scenario": "search"}, {"scenario": "home"}]


@pytest.fixture(scope="module")
def lum(tiny_prepared):
    torch.manual_seed(0)
    return build_lum(MODEL, tiny_prepared)


def make_query(lum, conditions=CONDITIONS, **changes) -> GroupQuery:
    model, builder = lum
    return GroupQuery(model, builder, conditions, **({"max_events": MODEL.max_events} | changes))


def with_events(lum, **changed) -> tuple:
    """The same LUM over the same data, but with other items or feedback (arrays by name)."""
    model, builder = lum
    data = copy.copy(builder.data)
    data.event_columns = dict(data.event_columns)
    for name, values in changed.items():
        if name == "item":
            data.item = values
        else:
            data.event_columns[name] = Column(torch.from_numpy(values))
    return model, builder.of_other_events(data)


def long_and_short_users(data, count=6) -> torch.Tensor:
    """Users of all lengths, some longer than several windows."""
    order = np.argsort(np.diff(data.user_offsets), kind="stable")
    return torch.from_numpy(order[np.linspace(0, len(order) - 1, count).astype(int)])


def naive_answer(lum, history: range, condition: dict) -> torch.Tensor:
    """One query about one stretch of history: no packing, no other query, no other user."""
    model, builder = lum
    windows = Windows(*(torch.tensor([value]) for value in (history.start, len(history), 0)))
    columns = condition_columns(builder.data, builder.condition_features, [condition])
    asked = {name: column.take(torch.tensor([0])) for name, column in columns.items()}
    pack = builder.pack(windows, queries=Queries(torch.tensor([0]), torch.tensor([len(history)]), asked))
    with torch.no_grad():
        return model.eval()(pack).o_QD[0]


def test_group_query_equals_asking_one_by_one(lum):
    data = lum[1].data
    users = long_and_short_users(data)
    o_BND = make_query(lum).users(users)
    assert o_BND.shape == (len(users), len(CONDITIONS), MODEL.dim)
    for place, user in enumerate(users.tolist()):
        end = data.user_offsets[user + 1]
        start = max(data.user_offsets[user], end - (MODEL.max_events - 1))
        for n, condition in enumerate(CONDITIONS):
            alone = naive_answer(lum, range(start, end), condition)
            torch.testing.assert_close(o_BND[place, n], alone, atol=2e-5, rtol=0)


def test_rows_equal_one_row_at_a_time_with_the_window_rule(lum):
    data, max_events, stride = lum[1].data, MODEL.max_events, 3
    users = long_and_short_users(data)
    row_R, o_RND = make_query(lum, CONDITIONS[:2], stride=stride, tokens_per_pack=200).rows(users)
    answers = dict(zip(row_R.tolist(), o_RND))
    lengths = np.diff(data.user_offsets)
    assert lengths[users.numpy()].max() > 2 * max_events
    expected_rows = [row for user in users.tolist() for row in range(*data.user_offsets[user : user + 2])][:]
    firsts = data.user_offsets[users.numpy()].tolist()
    assert sorted(answers) == sorted(set(expected_rows) - set(firsts))
    for user in users.tolist():
        start, end = data.user_offsets[user : user + 2]
        for row in range(start + 1, end):
            # The window rule, said another way: the window begins at the last multiple of the stride that leaves
            # max_events - stride events of history, and never before the user.
            behind = max(0, row - start - (max_events - stride))
            begin = start + behind // stride * stride
            assert max_events - stride <= row - begin < max_events or begin == start
            for n in (0, 1):
                alone = naive_answer(lum, range(begin, row), CONDITIONS[n])
                torch.testing.assert_close(answers[row][n], alone, atol=2e-5, rtol=0)


KINDS = [(encoder, tokens) for encoder in ENCODERS for tokens in ("interleaved", "merged")]


@pytest.fixture(scope="module")
def exact_lums(tiny_prepared):
    """LUMs of every kind in float64, with larger weights than at initialisation, so that every part matters."""
    lums = {}
    for encoder, tokens in KINDS:
        torch.manual_seed(0)
        config = ModelConfig(encoder=encoder, tokens=tokens, dim=16, num_layers=2, max_events=MODEL.max_events)
        model, builder = build_lum(config, tiny_prepared)
        with torch.no_grad():
            for parameter in model.user_encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        lums[encoder, tokens] = model.double().eval(), builder
    return lums


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_group_query_equals_separate_passes(exact_lums, data):
    """Whatever the histories, conditions, packs and portions; to the rounding of answers to float32."""
    lum = exact_lums[data.draw(st.sampled_from(KINDS))]
    longest = MODEL.max_events - 1
    length = st.one_of(st.sampled_from([0, 1, longest]), st.integers(0, longest))
    lengths = torch.tensor(data.draw(st.lists(length, min_size=1, max_size=4)))
    starts = torch.tensor([data.draw(st.integers(0, lum[1].data.num_events - longest)) for _ in lengths])
    count = data.draw(st.integers(1, 3))
    words = [{"query": "|".join(list(lum[1].data.vocabulary("query"))[:2]), "feedback": "like"}]
    condition = st.sampled_from(CONDITIONS + words)
    asked = [data.draw(st.lists(condition, min_size=count, max_size=count)) for _ in lengths]
    order = data.draw(st.permutations(range(count)))
    query = make_query(lum, tokens_per_pack=data.draw(st.sampled_from([1, 40, 8192])))
    windows = Windows(starts, lengths, torch.zeros_like(starts))
    budget = data.draw(st.sampled_from([1, 4000, lum_module.QUERY_BUDGET["cpu"]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lum_module.QUERY_BUDGET, "cpu", budget)
        o_BND = query.ask(windows, asked)
        permuted = query.ask(windows, [[each[n] for n in order] for each in asked])
    alone = [
        naive_answer(lum, range(start, start + length), one)
        for start, length, each in zip(starts.tolist(), lengths.tolist(), asked)
        for one in each
    ]
    torch.testing.assert_close(o_BND.double().flatten(0, 1), torch.stack(alone), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(permuted, o_BND[:, list(order)], atol=1e-6, rtol=1e-6)


def test_permuting_queries_permutes_answers(lum):
    order = [2, 0, 3, 1]
    users = long_and_short_users(lum[1].data)
    o_BND = make_query(lum).users(users)
    permuted = make_query(lum, [CONDITIONS[n] for n in order]).users(users)
    torch.testing.assert_close(permuted, o_BND[:, order], atol=2e-5, rtol=0)


def test_a_later_event_changes_no_earlier_answer(lum):
    data = lum[1].data
    user = int(np.argmax(np.diff(data.user_offsets)))
    start, end = data.user_offsets[user : user + 2]
    row_R, before = make_query(lum).rows(torch.tensor([user]))
    changed_row = (start + end) // 2
    item, clicked, scenario = (
        data.item.copy(),
        data.event_columns["clicked"].values.numpy().copy(),
        data.event_columns["scenario"].values.numpy().copy(),
    )
    item[changed_row] = (item[changed_row] + 1) % data.num_items
    clicked[changed_row] = 3 - clicked[changed_row]
    scenario[changed_row] = scenario[changed_row] % 2 + 1
    # The row itself is asked with the history before it: its own item, feedback and condition are not part of that.
    _, after = make_query(with_events(lum, item=item, clicked=clicked, scenario=scenario)).rows(torch.tensor([user]))
    earlier = row_R <= changed_row
    assert torch.equal(after[earlier], before[earlier])
    seen = (row_R > changed_row) & (row_R <= changed_row + MODEL.max_events // 2)
    assert (after[seen] - before[seen]).abs().amax((1, 2)).min() > 1e-4


def test_another_user_changes_nothing(lum):
    data = lum[1].data
    edited, others = 0, torch.arange(1, 8)
    item = data.item.copy()
    item[data.user_offsets[edited] : data.user_offsets[edited + 1]] = 0
    query, again = make_query(lum), make_query(with_events(lum, item=item))
    everyone = torch.cat([torch.tensor([edited]), others])
    assert torch.equal(query.users(everyone)[1:], again.users(everyone)[1:])
    assert not torch.equal(query.users(everyone)[0], again.users(everyone)[0])
    torch.testing.assert_close(query.users(others), query.users(everyone)[1:], atol=2e-5, rtol=0)


def test_an_empty_history_is_answered_from_the_condition_alone(lum):
    model, builder = lum
    query = make_query(lum)
    o_RND = query.answer(behind(Windows(*(torch.zeros(2, dtype=torch.int64),) * 3)))
    assert torch.equal(o_RND[0], o_RND[1])
    assert (o_RND[0, 0] - o_RND[0, 1]).abs().max() > 1e-4


def test_asking_nobody_gives_nothing(lum):
    query = make_query(lum)
    assert query.users(torch.zeros(0, dtype=torch.int64)).shape == (0, len(CONDITIONS), MODEL.dim)
    row_R, o_RND = query.rows(torch.zeros(0, dtype=torch.int64))
    assert len(row_R) == 0 and o_RND.shape == (0, len(CONDITIONS), MODEL.dim)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    max_events=st.integers(2, 12),
    stride_share=st.floats(0, 1),
    budget=st.integers(1, 200),
)
def test_windows_ask_each_row_once_with_enough_history(lengths, max_events, stride_share, budget):
    stride = 1 + int(stride_share * (max_events - 2))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # A moment of three rows here and there; each of its rows has the answer before the first of them.
    place = np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)
    back = np.where(place % 7 < 3, place % 7, 0)
    before = np.arange(offsets[-1]) - back
    data = type("Log", (), {"user_offsets": offsets, "before": before, "num_events": int(offsets[-1])})()
    users = torch.arange(len(lengths))
    answering = row_windows(data, users, max_events=max_events, stride=stride)
    parts = [answering.take(index) for index in packs(answering, num_conditions=2, tokens_per_pack=budget)]
    asked = sorted(row for part in parts for row in part.row_R.tolist())
    assert asked == np.flatnonzero((place > 0) & (back == 0)).tolist()
    answered = {}
    for part in parts:
        tokens_W = 2 * part.windows.length_W + 2 * part.answers_W
        assert int(tokens_W[:-1].sum()) < budget
        row_E, answer_E = answered_rows(data, part)
        assert not {*row_E.tolist()} & {*answered}
        answered |= dict(zip(row_E.tolist(), part.row_R[answer_E].tolist()))
    assert answered == {row: before[row] for row in np.flatnonzero(place > back).tolist()}
    assert int(answering.windows.length_W.max() if answering.windows.count else 0) <= max_events
    start_R, user_R = answering.row_R - answering.seen_R, answering.windows.user_W[answering.window_R]
    later_R = start_R > torch.from_numpy(offsets)[user_R]
    assert bool((answering.seen_R[later_R] >= max_events - stride).all())
    serving = serving_windows(data, users, max_events=max_events)
    assert serving.windows.length_W.tolist() == [min(length, max_events - 1) for length in lengths]
    assert (serving.windows.start_W + serving.windows.length_W).tolist() == offsets[1:].tolist()


def test_items_and_their_normaliser(lum):
    model, builder = lum
    query = make_query(lum)
    e_ID = query.items()
    assert e_ID.shape == (builder.data.num_items, MODEL.dim)
    torch.testing.assert_close(e_ID, encode_items(model, builder, block=50), atol=1e-5, rtol=0)
    o_XD = query.users(torch.arange(5)).flatten(0, 1)
    similarity = o_XD.double() @ e_ID.double().T
    torch.testing.assert_close(log_normalizer(o_XD, e_ID).double(), similarity.logsumexp(1), atol=1e-4, rtol=1e-5)
    share = (similarity - log_normalizer(o_XD, e_ID).double()[:, None]).exp()
    torch.testing.assert_close(share.sum(1), torch.ones(len(o_XD), dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 5.0, 50.0, 1e4])
def test_the_normaliser_is_exact_for_small_and_for_large_similarities(scale):
    generator = torch.Generator().manual_seed(0)
    o_XD, e_ID = scale * torch.randn(50, 8, generator=generator), torch.randn(300, 8, generator=generator)
    expected = (o_XD.double() @ e_ID.double().T).logsumexp(1)
    torch.testing.assert_close(log_normalizer(o_XD, e_ID).double(), expected, atol=1e-5, rtol=1e-6)


def test_the_normaliser_goes_over_several_blocks_of_items(monkeypatch):
    o_XD, e_ID = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.randn(11, 4)
    whole = log_normalizer(o_XD, e_ID)
    monkeypatch.setattr("lumrec.knowledge.log_normalizer.ITEM_BLOCK", 3)
    monkeypatch.setattr("lumrec.knowledge.log_normalizer.SUM_BUDGET", 6)
    torch.testing.assert_close(log_normalizer(o_XD, e_ID), whole)


def test_multi_valued_conditions_take_several_values(lum):
    words = list(lum[1].data.vocabulary("query"))[:2]
    one, two, swapped = make_query(
        lum, [{"query": words[0]}, {"query": "|".join(words)}, {"query": "|".join(words[::-1])}]
    ).users(torch.tensor([0]))[0]
    assert not torch.allclose(one, two)
    torch.testing.assert_close(two, swapped)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([], "no condition is asked"),
        ([{"feedbak": "like"}], "did you mean 'feedback'"),
        ([{"scenario": "serch"}], "did you mean 'search'"),
        ([{"hour": "3"}], "'hour' is no condition feature"),
    ],
)
def test_conditions_that_the_lum_does_not_know_are_named(lum, conditions, message):
    with pytest.raises(ValueError, match=message):
        make_query(lum, conditions)


def test_a_condition_that_only_the_schema_has_is_named(tiny_prepared):
    lum = build_lum(ModelConfig(dim=16, max_events=8, conditions=["scenario"]), tiny_prepared)
    with pytest.raises(ValueError, match="'feedback' is a condition that this LUM does not read"):
        make_query(lum, [{"feedback": "like"}])


@pytest.mark.parametrize("stride", [8, -1])
def test_a_stride_that_leaves_rows_without_history_is_refused(lum, stride):
    with pytest.raises(ValueError, match="stride of the windows"):
        make_query(lum, stride=stride)


def test_default_conditions_are_the_values_of_the_wishes(lum):
    builder = lum[1]
    asked = default_conditions(builder.data, builder.condition_features)
    assert asked == [{"feedback": "like"}, {"feedback": "dislike"}]  # whatever is more frequent
    assert list(builder.data.vocabulary("feedback")) == ["dislike", "like"]
    assert default_conditions(builder.data, ["scenario"]) == [{}]
