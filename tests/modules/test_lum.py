"""The Large User Model's invariances on drawn histories. Shapes as in lumrec.modules.lum."""

import pytest
import torch
from torch import Tensor

from lumrec.modules.layout import make_layout
from lumrec.modules.lum import TOKENS_PER_EVENT, LargeUserModel, Pack
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
    users: list[tuple[list[int], list[int]]], queries: list[tuple[int, int, int]] = (), *, per_event: int = 2
) -> Pack:
    """users: (items, conditions) of each. queries: (user, moment, condition), by user. Candidates: all items.

    Event k of a user, and a query at moment k, is at 1000 k² seconds.
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
        time_T=1000 * moment_T**2,
        time_Q=1000 * asked[:, 1] ** 2,
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


@pytest.fixture(
    params=[("cosine", "gpt", "interleaved"), ("dot", "gpt", "merged"), ("dot", "llama", "interleaved")]
    + [("cosine", "hstu", "interleaved"), ("dot", "hstu", "merged")],
    ids="-".join,
)
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
