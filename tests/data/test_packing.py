"""Packs and their loader: what is in them, the same again from the same state, nothing of users who are held out."""

import numpy as np
import pytest
import torch

from lumrec.data.packing import ABSENT, NegativeSampler, NegativesConfig, PackingConfig, PackLoader, Queries
from lumrec.data.sequences import Windows
from lumrec.data.splits import TRAIN, user_fold
from lumrec.train.lum import ModelConfig, build_lum
from lumrec.train.pretrain import training_users

MODEL = ModelConfig(dim=16, num_heads=2, max_events=16, conditions=["feedback", "scenario"])


@pytest.fixture(scope="module")
def builder(tiny_prepared):
    return build_lum(MODEL, tiny_prepared)[1]


def make_loader(builder, **changes) -> PackLoader:
    arguments = {
        "users": np.ones(builder.data.num_users, dtype=bool),
        "max_events": MODEL.max_events,
        "packing": PackingConfig(events_per_pack=128),
        "negatives": NegativesConfig(sampled=32),
        "seed": 3,
    }
    return PackLoader(builder, **(arguments | changes))


def content(pack) -> list:
    return [
        pack.tokens.values().tolist(),
        pack.tokens.lengths().tolist(),
        pack.positive_T.tolist(),
        pack.log_weight_C.tolist(),
        pack.event_row_T.tolist(),
        pack.contrast_event_Q.tolist(),
    ]


def bags(pack, feature: str) -> list[list[int]]:
    jagged = pack.tokens[feature]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def test_an_epoch_holds_each_training_event_once_within_the_budget(builder):
    loader, data = make_loader(builder), builder.data
    for _ in range(2):
        packs = list(loader)
        rows = torch.cat([pack.event_row_T for pack in packs])
        assert sorted(rows.tolist()) == np.flatnonzero(data.split == TRAIN).tolist()
        assert max(pack.num_events for pack in packs) < 128 + MODEL.max_events
    assert loader.epoch == 2


def test_ranks_share_an_epoch_out_and_get_equally_many_packs(builder):
    loaders = [make_loader(builder, rank=rank, world_size=3) for rank in range(3)]
    packs = [list(loader) for loader in loaders]
    assert len({len(of_rank) for of_rank in packs}) == 1
    rows = torch.cat([pack.event_row_T for of_rank in packs for pack in of_rank])
    assert sorted(rows.tolist()) == np.flatnonzero(builder.data.split == TRAIN).tolist()


def test_resumed_in_mid_epoch_the_same_packs_follow(builder):
    loader = make_loader(builder, contrast_feature="feedback")
    epochs = [content(pack) for _ in range(2) for pack in loader]
    interrupted = make_loader(builder, contrast_feature="feedback")
    stream = iter(interrupted)
    seen = [content(next(stream)) for _ in range(3)]
    resumed = make_loader(builder, contrast_feature="feedback")
    resumed.load_state_dict(interrupted.state_dict())
    rest = [content(pack) for _ in range(2) for pack in resumed]
    assert seen + rest == epochs
    assert seen[0] != rest[0]


def test_another_number_of_ranks_goes_on_with_the_next_pack(builder):
    expected, seen = [content(pack) for pack in make_loader(builder)], {}
    state = make_loader(builder).state_dict()
    for world_size, steps in ((2, 1), (1, 1), (3, 99)):
        for rank in range(world_size):
            loader = make_loader(builder, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            for step, pack in zip(range(steps), loader):
                seen[state["done"] + step * world_size + rank] = content(pack)
        state = loader.state_dict()
    assert state == {"epoch": 1, "done": 0} and len(expected) > 6
    assert [seen[number] for number in range(len(expected))] == expected


def test_a_pack_holds_what_the_log_holds(builder):
    data = builder.data
    start = int(data.user_offsets[0])
    windows = Windows(torch.tensor([start]), torch.tensor([3]), torch.tensor([0]))
    like = data.vocabulary("feedback")["like"]
    queries = Queries(torch.tensor([0, 0]), torch.tensor([1, 3]), {"feedback": torch.tensor([like, ABSENT])})
    pack = builder.pack(windows, queries=queries, candidates_C=torch.tensor([5]))
    item = data.item[start : start + 3].tolist()
    item_rows = data.item_columns["item_id"].values
    assert bags(pack, "item_id") == [[int(item_rows[i])] for i in item] + [[], []] + [[int(item_rows[5])]]
    feedback = data.event_columns["feedback"].values[start : start + 3].tolist()
    assert bags(pack, "feedback") == [[row] for row in feedback] + [[like], [], []]
    clicked = data.event_columns["clicked"].values[start : start + 3].tolist()
    assert bags(pack, "clicked") == [[row] for row in clicked] + [[], [], []]
    assert pack.query_prefix_Q.tolist() == [2, 6]


def test_positives_are_the_events_items(builder):
    pack = next(iter(make_loader(builder)))
    item_id = bags(pack, "item_id")
    candidates = item_id[pack.num_events + pack.num_queries :]
    assert len({tuple(c) for c in candidates}) == len(candidates)
    assert [candidates[p] for p in pack.positive_T.tolist()] == item_id[: pack.num_events]


def test_a_contrast_query_differs_from_its_event_in_that_condition_alone(builder):
    pack = next(iter(make_loader(builder, contrast_feature="feedback", packing=PackingConfig(128, 0.3))))
    feedback, scenario = bags(pack, "feedback"), bags(pack, "scenario")
    shown = [t for t in range(pack.num_events) if feedback[t]]
    assert pack.contrast_event_Q.tolist() == shown
    for q, event in enumerate(shown):
        asked, told = feedback[pack.num_events + q], feedback[event]
        assert len(asked) == 1 and asked != told and asked[0] >= 1
        assert scenario[pack.num_events + q] == scenario[event]


def test_conditions_are_withheld_at_the_given_rate(builder):
    for rate in (0.0, 0.5, 1.0):
        packs = list(make_loader(builder, packing=PackingConfig(128, rate)))
        lengths = torch.cat([pack.tokens["scenario"].lengths()[: pack.num_events] for pack in packs])
        assert 1 - float(lengths.float().mean()) == pytest.approx(rate, abs=0.05)


def test_a_held_out_fold_is_never_in_a_pack(builder):
    """No leak: with fold=0/2 the LUM that is asked for the users of fold 0 has met none of their events."""
    data = builder.data
    users = training_users(data, "0/2")
    held_out = set(np.flatnonzero(user_fold(data.user_keys(), 2) == 0).tolist())
    assert held_out and len(held_out) < data.num_users
    rows = torch.cat([pack.event_row_T for pack in make_loader(builder, users=users)])
    assert held_out.isdisjoint(data.user[rows].tolist())


def test_logq_makes_the_weights_an_unbiased_estimate_of_the_catalogue():
    counts = np.array([0, 1, 5, 20, 100])
    generator = torch.Generator().manual_seed(0)
    config = NegativesConfig(in_batch=False, sampled=64, sampling="popularity")
    sampler = NegativeSampler(config, counts)
    sums = torch.zeros(5, dtype=torch.float64)
    for _ in range(3000):
        candidates, _, log_weight = sampler.draw(torch.zeros(0, dtype=torch.int64), generator)
        sums[candidates] += log_weight.double().exp()
    torch.testing.assert_close(sums[1:] / 3000, torch.ones(4, dtype=torch.float64), rtol=0.1, atol=0)
    assert sums[0] == 0  # an item without training events is no negative


def test_in_batch_negatives_count_how_often_an_item_occurs():
    sampler = NegativeSampler(NegativesConfig(sampled=0, logq=False), np.array([1, 1, 1]))
    candidates, positive, log_weight = sampler.draw(torch.tensor([2, 0, 2]), torch.Generator())
    assert candidates.tolist() == [0, 2] and positive.tolist() == [1, 0, 1]
    torch.testing.assert_close(log_weight.exp(), torch.tensor([1.0, 2.0]))


def test_the_full_catalogue():
    sampler = NegativeSampler(NegativesConfig(full=True), np.array([0, 1, 1]))
    candidates, positive, log_weight = sampler.draw(torch.tensor([2, 1]), torch.Generator())
    assert (candidates.tolist(), positive.tolist(), log_weight.tolist()) == ([0, 1, 2], [2, 1], [0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": PackingConfig(events_per_pack=8)}, "not even one full window fits"),
        ({"contrast_feature": "category"}, "conditions that the model reads"),
        ({"negatives": NegativesConfig(in_batch=False, sampled=0)}, "no negatives"),
        ({"negatives": NegativesConfig(sampling="zipf")}, "expected one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(builder, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(builder, **changes)


def test_no_training_events_is_an_error(builder):
    with pytest.raises(ValueError, match="no training events"):
        make_loader(builder, users=np.zeros(builder.data.num_users, dtype=bool))
