"""The Large User Model's invariances on drawn histories. Shapes as in lumrec.modules.large_user_model."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumrec.modules import large_user_model as lum
from lumrec.modules.large_user_model import TOKENS_PER_EVENT, LargeUserModel, Pack
from lumrec.modules.layout import make_layout
from lumrec.modules.tokens import TokenEncoder, make_kjt, make_tables
from lumrec.modules.user_encoder import UserEncoder

NUM_ITEMS, NUM_CONDITIONS, DIM, MAX_TOKENS = 20, 4, 16, 40


def make_model(similarity: str = "cosine", encoder: str = "gpt", tokens: str = "interleaved") -> LargeUserModel:
    torch.manual_seed(0)
    tables = make_tables(
        {"item": (NUM_ITEMS, 8), "condition": (NUM_CONDITIONS, 8)}, {"item": "item", "condition": "condition"}
    )
    token_encoder = TokenEncoder(tables, item_features=["item"], condition_features=["condition"], dim=DIM)
    user_encoder = UserEncoder(
        encoder=encoder, dim=DIM, num_layers=2, num_heads=2, max_tokens=MAX_TOKENS, dropout=0.1, time_bias=True
    )
    for name, parameter in user_encoder.named_parameters():  # larger than at initialisation, so that attention matters
        if parameter.dim() > 1 or name.startswith("biases"):
            torch.nn.init.normal_(parameter, std=0.2)
    model = LargeUserModel(token_encoder, user_encoder, dim=DIM, similarity=similarity, tokens=tokens)
    return model.double().eval()


def make_pack(
    users: list[tuple[list[int], list[int]]],
    queries: list[tuple[int, int, int]] = (),
    *,
    per_event: int = 2,
    before: list[int] | None = None,
) -> Pack:
    """users: (items, conditions) of each. queries: (user, moment, condition), by user. Candidates: all items.

    Event k of a user, and a query at moment k, is at 1000 k² seconds. before: events of each user that are not in the
    pack, but were before.
    """
    lengths = torch.tensor([len(items) for items, _ in users], dtype=torch.int64)
    item_T = torch.tensor([item for items, _ in users for item in items], dtype=torch.int64)
    condition_T = torch.tensor([c for _, conditions in users for c in conditions], dtype=torch.int64)
    asked = torch.tensor(list(queries), dtype=torch.int64).view(-1, 3)
    T, Q, C = len(item_T), len(asked), NUM_ITEMS
    one = torch.ones
    columns = {
        "item": (torch.cat([item_T, torch.arange(C)]), torch.cat([one(T), torch.zeros(Q), one(C)]).long()),
        "condition": (torch.cat([condition_T, asked[:, 2]]), torch.cat([one(T + Q), torch.zeros(C)]).long()),
    }
    prefix_Q = per_event * asked[:, 1]
    layout = make_layout(per_event * lengths, query_sequence_Q=asked[:, 0], query_prefix_Q=prefix_Q)
    moment_T = torch.cat([torch.arange(0), *(torch.arange(length) for length in lengths)])
    before_B = torch.tensor(before or [0] * len(users), dtype=torch.int64)
    place_Q = (lengths.cumsum(0) - lengths)[asked[:, 0]] + asked[:, 1]
    none = torch.zeros(0, dtype=torch.int64)
    return Pack(
        tokens=make_kjt(["item", "condition"], columns, stride=T + Q + C),
        layout=layout,
        num_events=T,
        num_queries=Q,
        num_candidates=C,
        query_prefix_Q=prefix_Q,
        previous_T=torch.where(moment_T == 0, -1, torch.arange(T) - 1),
        previous_Q=torch.where(asked[:, 1] == 0, -1, place_Q - 1),
        time_T=1000 * (moment_T + before_B.repeat_interleave(lengths)) ** 2,
        time_Q=1000 * (asked[:, 1] + before_B[asked[:, 0]]) ** 2,
        candidate_item_C=torch.arange(C),
        positive_T=item_T,
        log_weight_C=torch.zeros(C),
        log_positive_weight_T=torch.zeros(0),
        contrast_event_Q=none,
        event_row_T=torch.arange(T),
    )


def history(length: int, seed: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, NUM_ITEMS, (length,), generator=generator).tolist()
    return items, torch.randint(1, NUM_CONDITIONS, (length,), generator=generator).tolist()


USERS = [history(7, 1), history(1, 2), history(20, 3), history(6, 4)]


KINDS = [("cosine", "gpt", "interleaved"), ("dot", "gpt", "merged"), ("dot", "llama", "interleaved")] + [
    ("cosine", "hstu", "interleaved"),
    ("dot", "hstu", "merged"),
]


@pytest.fixture(params=KINDS, ids="-".join)
def model(request) -> LargeUserModel:
    return make_model(*request.param)


def pack_for(model: LargeUserModel, users, queries=()) -> Pack:
    return make_pack(users, queries, per_event=TOKENS_PER_EVENT[model.tokens])


def outputs(model: LargeUserModel, users, queries=()) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        o_TD, o_QD, _ = model(pack_for(model, users, queries))
    return o_TD, o_QD


def test_packed_equals_one_by_one(model):
    packed, _ = outputs(model, USERS)
    single = torch.cat([outputs(model, [user])[0] for user in USERS])
    torch.testing.assert_close(packed, single)


def test_editing_one_user_leaves_the_others_as_they_were(model):
    edited = [USERS[0], USERS[1], history(20, 99), USERS[3]]
    before, after = outputs(model, USERS)[0], outputs(model, edited)[0]
    torch.testing.assert_close(before[:8], after[:8], rtol=0, atol=0)
    torch.testing.assert_close(before[28:], after[28:], rtol=0, atol=0)
    assert not torch.allclose(before[8:28], after[8:28])


@pytest.mark.parametrize("moment", [0, 3, 6])
def test_what_comes_later_changes_nothing_before(model, moment):
    """An output at condition token k depends on events before k and on condition k, on nothing else."""
    items, conditions = USERS[0]
    later_items = items[:moment] + [19 - i for i in items[moment:]]
    later_conditions = conditions[: moment + 1] + [4 - c for c in conditions[moment + 1 :]]
    before = outputs(model, [(items, conditions)])[0]
    after = outputs(model, [(later_items, later_conditions)])[0]
    torch.testing.assert_close(before[: moment + 1], after[: moment + 1])


def test_a_query_with_the_true_condition_equals_the_condition_token(model):
    items, conditions = USERS[0]
    queries = [(0, moment, conditions[moment]) for moment in range(len(items))]
    o_TD, o_QD = outputs(model, [USERS[0]], queries)
    torch.testing.assert_close(o_QD, o_TD)


def test_group_query_equals_separate_passes_in_any_order(model):
    queries = [(0, 7, 1), (0, 3, 2), (0, 7, 3), (2, 15, 1), (2, 0, 2)]
    together = outputs(model, USERS, queries)[1]
    for answer, (user, moment, condition) in zip(together, queries, strict=True):
        items, conditions = USERS[user]
        # A separate pass: the history up to the moment and the condition token of a next event, whatever its item.
        alone = outputs(model, [(items[:moment] + [0], conditions[:moment] + [condition])])[0][-1]
        torch.testing.assert_close(answer, alone)
    order = [2, 0, 1, 4, 3]
    torch.testing.assert_close(outputs(model, USERS, [queries[i] for i in order])[1], together[order])


def test_queries_only_gives_the_same_answers(model):
    queries = [(0, 7, 1), (1, 0, 2), (3, 6, 3)]
    pack = pack_for(model, USERS, queries)
    with torch.no_grad():
        whole, short = model(pack), model(pack, queries_only=True)
    torch.testing.assert_close(short.o_QD, whole.o_QD)
    assert len(short.o_TD) == 0


def test_queries_in_portions_give_the_same_answers(model, monkeypatch):
    queries = [(0, 7, 1), (0, 3, 2), (1, 0, 2), (2, 19, 3), (2, 19, 2), (3, 6, 3)]
    pack, asked = pack_for(model, USERS, queries), []
    once = model.user_encoder.ask
    monkeypatch.setattr(model.user_encoder, "ask", lambda *args, **settings: asked.append(0) or once(*args, **settings))
    with torch.no_grad():
        whole = model(pack, queries_only=True)
        assert not asked
        for budget, num_portions in ((1, 6), (model._cost_at_once(pack.layout) - 1, 1)):  # the latter: without padding
            monkeypatch.setitem(lum.QUERY_BUDGET, "cpu", budget)
            portioned = model(pack, queries_only=True)
            assert len(asked) == num_portions
            torch.testing.assert_close(portioned, whole)
            asked.clear()


def test_a_history_is_read_on(model):
    """New events cost what they add, and leave what reading everything at once would."""
    lengths = [7, 1, 15, 0, 6]
    users = [history(length, seed) for seed, length in enumerate(lengths)]
    queries = [(user, moment, 1 + moment % 3) for user, moment in enumerate(lengths) for _ in range(2)]
    with torch.no_grad():
        expected, at_once = model(pack_for(model, users, queries)), model.read(pack_for(model, users))[0]
        known, seen = None, [0] * len(users)
        for until in ([3, 0, 14, 0, 0], [3, 1, 15, 0, 4], lengths):
            new = [tuple(part[a:b] for part in user) for user, a, b in zip(users, seen, until)]
            asked = [(user, moment - seen[user], c) for user, moment, c in queries if moment == until[user]]
            per_event = TOKENS_PER_EVENT[model.tokens]
            known, o_QD = model.read(make_pack(new, asked, per_event=per_event, before=seen), known)
            rows = [row for row, (user, moment, _) in enumerate(queries) if moment == until[user]]
            torch.testing.assert_close(o_QD, expected.o_QD[rows])
            seen = until
        torch.testing.assert_close(known.layers, at_once.layers)
        assert torch.equal(known.lengths_B, at_once.lengths_B) and torch.equal(known.seen_T, at_once.seen_T)
        torch.testing.assert_close((known.item_BD, known.time_B), (at_once.item_BD, at_once.time_B))
        some = known.select(torch.tensor([4, 1]))
        torch.testing.assert_close(vars(some), vars(model.read(pack_for(model, [users[4], users[1]]))[0]))


def test_a_history_that_grows_too_long_is_to_be_read_again(model):
    longest = MAX_TOKENS // TOKENS_PER_EVENT[model.tokens]
    with torch.no_grad():
        known, _ = model.read(pack_for(model, [history(longest, 1)]))
        with pytest.raises(ValueError, match=r"grows to 4[12] tokens, but .* 40 positions .max_tokens.: .* again"):
            model.read(pack_for(model, [history(1, 2)]), known)
        with pytest.raises(ValueError, match="2 windows for 1 histories"):
            model.read(pack_for(model, [history(0, 2)] * 2), known)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_group_query_equals_separate_passes(data):
    """In one pass, in portions, or read on: each answer is that of a pass with this query alone (float64)."""
    model = made(*data.draw(st.sampled_from(KINDS)))
    per_event = TOKENS_PER_EVENT[model.tokens]
    longest = MAX_TOKENS // per_event - 1  # events before a query: it stands where the next event's condition would
    length = st.one_of(st.sampled_from([0, 1, longest]), st.integers(0, longest))
    lengths = data.draw(st.lists(length, min_size=1, max_size=4))
    users = [history(length, seed) for seed, length in enumerate(lengths)]
    moment_of = [st.tuples(st.just(u), st.integers(0, n), st.integers(1, 3)) for u, n in enumerate(lengths)]
    queries = [query for one in moment_of for query in data.draw(st.lists(one, max_size=4))]
    cut = [data.draw(st.integers(0, n)) for n in lengths]
    queries_after = [(u, moment - cut[u], c) for u, moment, c in queries if moment >= cut[u]]
    with torch.no_grad():
        expected = [
            model(pack_for(model, [(users[u][0][:moment] + [0], users[u][1][:moment] + [c])])).o_TD[-1]
            for u, moment, c in queries
        ]
        expected = torch.stack(expected) if expected else torch.zeros(0, DIM).double()
        pack = pack_for(model, users, queries)
        torch.testing.assert_close(model(pack).o_QD, expected)
        torch.testing.assert_close(model(pack, queries_only=True).o_QD, expected)
        torch.testing.assert_close(model.read(pack)[1], expected)
        known, _ = model.read(pack_for(model, [tuple(part[:n] for part in user) for user, n in zip(users, cut)]))
        rest = [tuple(part[n:] for part in user) for user, n in zip(users, cut)]
        _, o_QD = model.read(make_pack(rest, queries_after, per_event=per_event, before=cut), known)
        after = [row for row, (u, moment, _) in enumerate(queries) if moment >= cut[u]]
        torch.testing.assert_close(o_QD, expected[after])


@functools.cache
def made(*kind: str) -> LargeUserModel:
    return make_model(*kind)


def test_an_empty_pack_is_computed(model):
    o_TD, o_QD = outputs(model, [])
    assert o_TD.shape == o_QD.shape == (0, DIM)


def test_similarity_is_the_dot_product(model):
    with torch.no_grad():
        o_TD, _, e_CD = model(pack_for(model, USERS))
    if model.similarity == "cosine":
        bound = torch.full((), 1 / model.temperature, dtype=torch.float64)
        torch.testing.assert_close((o_TD * o_TD).sum(1), bound.expand(len(o_TD)))
        assert (o_TD @ e_CD.t()).abs().max() <= bound + 1e-9


def test_bad_settings_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="similarity"):
        LargeUserModel(model.token_encoder, model.user_encoder, dim=DIM, similarity="euclid")
    with pytest.raises(ValueError, match="temperature"):
        LargeUserModel(model.token_encoder, model.user_encoder, dim=DIM, temperature=0.0)
    with pytest.raises(ValueError, match="heads"):
        UserEncoder(dim=10, num_layers=1, num_heads=3, max_tokens=4)


@pytest.mark.parametrize("per_event, tokens", [(2, "interleaved"), (1, "merged")])
def test_a_pack_from_lists_equals_one_from_tensors(per_event, tokens):
    """Every field, with a user without events and one without queries."""
    users = [history(3, 1), ([], []), history(2, 5)]
    asked = [[1, 2], [3], []]
    queries = [(user, len(users[user][0]), wish) for user, wishes in enumerate(asked) for wish in wishes]
    expected = make_pack(users, queries, per_event=per_event)
    made = Pack.from_lists(
        [[{"item": i, "condition": c} for i, c in zip(*user, strict=True)] for user in users],
        make_model(tokens=tokens),
        queries=[[{"condition": wish} for wish in wishes] for wishes in asked],
        candidates=[{"item": [i]} for i in range(NUM_ITEMS)],
        positives=[items for items, _ in users],
        times=[[1000 * k**2 for k in range(len(items))] for items, _ in users],
    )
    expected.time_Q = torch.tensor([4000, 4000, 0])  # of the last event
    for name, value in vars(expected).items():
        if name == "tokens":
            assert value.to_dict().keys() == made.tokens.to_dict().keys()
            assert value.values().tolist() == made.tokens.values().tolist()
            assert value.lengths().tolist() == made.tokens.lengths().tolist()
        elif isinstance(value, Tensor):
            assert torch.equal(value, getattr(made, name)), name
        elif name != "layout":
            assert value == getattr(made, name)
    assert repr(expected.layout) == repr(made.layout)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"users": [[{"itme": 1}]]}, r"no features \['itme'\]; its features are \['item', 'condition'\]"),
        ({"users": [[{"item": -1}]]}, "'item' has the row -1"),
        ({"users": [[]], "queries": [[], []]}, "there are 1 users; .* got queries 2"),
        ({"users": [[{"item": 1}]], "times": [[]]}, "user 0 has 1 events and 0 times"),
        ({"users": [[{"item": 1}]]}, "give `times`"),
        ({"users": [[{"item": 1}]], "times": [[0]], "positives": [[0]]}, "positives name candidates"),
        ({"users": [[{"item": 1}] * 21], "times": [[0] * 21]}, "user 0 has 21 events; this model takes at most 20 "),
        (
            {"users": [[{"item": 1}] * 20], "times": [[0] * 20], "queries": [[{}]]},
            "user 0 has 20 events; this model takes at most 19 with queries",
        ),
    ],
)
def test_lists_that_make_no_pack(arguments, said):
    users = arguments.pop("users")
    arguments.setdefault("times", None if said == "give `times`" else [[0]] * len(users))
    with pytest.raises(ValueError, match=said):
        Pack.from_lists(users, make_model(), **arguments)
