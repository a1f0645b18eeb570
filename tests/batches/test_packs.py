"""Packs and their loader: what is in them, the same again from the same state, nothing of users who are held out."""

import dataclasses

import numpy as np
import pytest
import torch

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.packs import ABSENT, PackingConfig, PackLoader, Queries
from lumrec.batches.windows import Windows
from lumrec.data.columns import expand_ranges
from lumrec.data.splits import TRAIN, user_fold
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.modules.large_user_model import Pack
from lumrec.stages.pretrain import training_users

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


def test_ranks_of_a_step_have_about_the_same_work(builder):
    loaders = [make_loader(builder, token_cost=40.0, rank=rank, world_size=2) for rank in range(2)]
    costs = np.array([[pack_cost(pack) for pack in loader] for loader in loaders])[:, :-1]  # the last step is a rest
    assert costs.shape[1] > 2
    assert (costs.max(0) / costs.mean(0)).max() < 1.03


def pack_cost(pack) -> float:
    tokens_B = pack.layout.offsets_B1.diff().double()
    return float((tokens_B * (40.0 + tokens_B)).sum())


def test_resumed_on_two_ranks_the_same_packs_follow(builder):
    for rank in range(2):
        epoch = [content(pack) for pack in make_loader(builder, rank=rank, world_size=2)]
        resumed = make_loader(builder, rank=rank, world_size=2)
        resumed.load_state_dict({"epoch": 0, "done": 4})
        assert [content(pack) for pack in resumed] == epoch[2:]


def test_on_one_rank_a_pack_is_a_stretch_of_the_shuffled_windows(builder):
    """What experiments of one rank trained on stays as it was, whatever a token is said to cost."""
    loader = make_loader(builder, token_cost=1.0)
    windows = loader._windows(0)
    before_W = windows.length_W.cumsum(0) - windows.length_W
    packs = list(loader)
    for number, pack in enumerate(packs):
        expected = windows[before_W // 128 == number]
        assert pack.event_row_T.tolist() == expand_ranges(expected.start_W, expected.length_W).tolist()
    assert len(packs) == int(before_W[-1]) // 128 + 1


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


def test_another_number_of_ranks_goes_on_with_the_next_budget(builder):
    """What W ranks have in one step is what one rank has in W packs, from wherever they begin."""
    expected = [sorted(pack.event_row_T.tolist()) for pack in make_loader(builder)]
    state, done = make_loader(builder).state_dict(), 0
    for world_size, steps in ((2, 1), (1, 1), (3, 99)):
        seen: dict[int, list[int]] = {}
        for rank in range(world_size):
            loader = make_loader(builder, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            for step, pack in zip(range(steps), loader):
                seen.setdefault(step, []).extend(pack.event_row_T.tolist())
        state = loader.state_dict()
        for rows in seen.values():
            assert sorted(rows) == sorted(row for pack in expected[done : done + world_size] for row in pack)
            done += world_size
    assert state == {"epoch": 1, "done": 0} and done >= len(expected) > 6


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
    time = data.timestamp[start : start + 3].tolist()
    assert pack.time_T.tolist() == time
    # Asked at moment 1, as the second event was; behind the window's end, at the time of its last event.
    assert pack.time_Q.tolist() == [time[1], time[2]]


def test_previous_events_are_those_of_the_same_window(tiny_prepared):
    """One token an event (merged): what is before an event, or a query, lies in its own window or nowhere."""
    _, builder = build_lum(dataclasses.replace(MODEL, tokens="merged"), tiny_prepared)
    start = int(builder.data.user_offsets[0])
    windows = Windows(torch.tensor([start, start, start + 3]), torch.tensor([3, 0, 2]), torch.tensor([0, 0, 0]))
    queries = Queries(torch.tensor([0, 0, 1, 2]), torch.tensor([3, 0, 0, 1]), {}, torch.tensor([7, 8, 9, 10]))
    pack = builder.pack(windows, queries=queries)
    assert pack.previous_T.tolist() == [-1, 0, 1, -1, 3]
    assert pack.previous_Q.tolist() == [2, -1, -1, 3]
    assert pack.query_prefix_Q.tolist() == [3, 0, 0, 1]
    assert pack.layout.offsets_B1.tolist() == [0, 3, 3, 5]
    assert pack.time_Q.tolist() == [7, 8, 9, 10]


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


def test_expected_counts_of_a_step_are_over_the_events_of_all_ranks(builder):
    """Weights are counts over what a step of three ranks, of 3 · 32 draws, is to be expected to hold."""
    negatives = NegativesConfig(sampled=32, across_ranks=True)
    loaders = [make_loader(builder, negatives=negatives, rank=rank, world_size=3) for rank in range(3)]
    popularity_I = loaders[0].sampler.popularity_I
    for packs in zip(*loaders, strict=True):
        num_events = sum(pack.num_events for pack in packs)
        for pack in packs:
            expected_C = 96 / (popularity_I > 0).sum() + num_events * popularity_I[pack.candidate_item_C]
            count_C = pack.log_weight_C.double().exp() * expected_C
            torch.testing.assert_close(count_C, count_C.round(), rtol=0, atol=1e-3)
            assert int(count_C.round().sum()) == 32 + pack.num_events


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": PackingConfig(events_per_pack=8)}, "so a pack cannot hold a full window"),
        ({"contrast_feature": "category"}, "conditions that the model reads"),
        ({"negatives": NegativesConfig(in_batch=False, sampled=0)}, "no negatives"),
    ],
)
def test_settings_that_cannot_work_are_refused(builder, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(builder, **changes)


def test_no_training_events_is_an_error(builder):
    with pytest.raises(ValueError, match="no training events"):
        make_loader(builder, users=np.zeros(builder.data.num_users, dtype=bool))


def test_plain_lists_make_the_same_pack(tiny_prepared):
    """Pack.from_lists of the events of three windows, their conditions as queries, and two candidates."""
    model, builder = build_lum(MODEL, tiny_prepared)
    data = builder.data
    length_W = torch.tensor([5, 0, 3])
    start_W = torch.from_numpy(data.user_offsets[:3]) + torch.tensor([0, 0, 2])
    row_T = expand_ranges(start_W, length_W)
    roles = [(data.item_columns[name], name, builder.item_E[row_T]) for name in builder.item_features]
    names = dict.fromkeys([*builder.feedback_features, *builder.condition_features])
    events = lists([*roles, *((data.event_columns[name], name, row_T) for name in names)], len(row_T))
    conditions = lists([(data.event_columns[name], name, row_T) for name in builder.condition_features], len(row_T))
    candidates_C = torch.tensor([4, 7])
    asked = Queries(
        torch.tensor([0, 0, 2]),
        torch.tensor([5, 5, 3]),
        {name: data.event_columns[name].take(row_T[[1, 3, 6]]) for name in builder.condition_features},
        time_Q=builder.time_E[row_T[[4, 4, 7]]],
    )
    expected = builder.pack(Windows(start_W, length_W, torch.arange(3)), queries=asked, candidates_C=candidates_C)
    made = Pack.from_lists(
        [events[:5], [], events[5:]],
        model,
        queries=[[conditions[1], conditions[3]], [], [conditions[6]]],
        candidates=lists([(data.item_columns[name], name, candidates_C) for name in builder.item_features], 2),
        times=[builder.time_E[row_T[:5]].tolist(), [], builder.time_E[row_T[5:]].tolist()],
    )
    made.candidate_item_C, made.event_row_T = candidates_C, row_T  # indices of the lists, not of the prepared data
    assert digest(made) == digest(expected)


def lists(columns, num: int) -> list[dict[str, list[int]]]:
    """The bags of each (column, feature, rows), as one dict for each row."""
    bags: list[dict[str, list[int]]] = [{} for _ in range(num)]
    for column, name, rows in columns:
        values, lengths = column.take(rows)
        for bag, part in zip(bags, values.split(lengths.tolist()), strict=True):
            bag[name] = part.tolist()
    return bags


def digest(pack: Pack) -> dict[str, object]:
    fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
    fields["tokens"] = [pack.tokens.keys(), pack.tokens.values().tolist(), pack.tokens.lengths().tolist()]
    return {name: value.tolist() if isinstance(value, torch.Tensor) else repr(value) for name, value in fields.items()}
