"""Retrieval as a stage, on small simulated logs: planted signal, no leak, LUM knowledge, on one rank and on two."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_knowledge import make_knowledge

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.tower_rows import TowerLoader
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TEST, TRAIN, VALID
from lumrec.evaluation.retrieval import last_events, rank_targets
from lumrec.experiments.config import Config, load
from lumrec.knowledge.store import Knowledge
from lumrec.models.towers import build_towers, tower_features
from lumrec.run.distributed import init_distributed
from lumrec.stages.registry import STAGES
from lumrec.stages.retrieve import (
    RetrieveConfig,
    item_vectors,
    knowledge_metrics,
    make_step,
    positive_events,
    retrieval_metrics,
    user_vectors,
)
from lumrec.train.checkpoint import best_checkpoint, load_weights
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard

WORDS = [
    "data.split.kind=leave_one_out",
    "retrieve.batch_size=128",
    "retrieve.dim=16",
    "retrieve.hidden_dims=[16]",
    "retrieve.negatives.sampled=64",
    "retrieve.train.epochs=2",
    "retrieve.train.log_every=1",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Words of a runs folder that holds prepared data, two cross-fitted LUMs and their knowledge."""
    return make_knowledge(tmp_path_factory.mktemp("retrieve"), *WORDS)


@pytest.fixture(scope="module")
def data(words) -> PreparedData:
    return PreparedData.open(Path(load(None, words).runs_dir) / "tiny-prepare")


def folder_of(config: Config) -> Path:
    return Path(config.runs_dir) / config.run


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("knowledge", ["none", "direct"])
def test_a_run_ends_with_exact_and_ann_figures_of_its_best_checkpoint(words, data, knowledge):
    config = load(None, [*words, f"run={knowledge}", f"retrieve.knowledge={knowledge}"])
    result = STAGES["retrieve"].run(config)
    assert json.loads((folder_of(config) / "result.json").read_text()) == result
    assert {"hr@10", "hr@50", "ndcg@10", "valid/ndcg@10", "ann/hr@10", "ann/recall@50", "rows_per_s"} <= set(result)
    assert result.get("knowledge_hazard") == (None if knowledge == "none" else "cross_fit")
    losses = losses_of(folder_of(config))
    assert losses[-1] < losses[0]
    store = None if knowledge == "none" else Knowledge.open(Path(config.runs_dir) / "tiny-query", data)
    towers, builder = build_towers(config.retrieve, data, knowledge=store)
    dmp = shard(towers, device=init_distributed("cpu"))
    before = {name: value.clone() for name, value in dmp.named_parameters()}
    load_weights(best_checkpoint(folder_of(config)), dmp)
    assert [name for name, value in dmp.named_parameters() if torch.equal(value, before[name])] == []
    settings = dataclasses.replace(config.retrieve, batch_size=7)
    again = retrieval_metrics(dmp, builder, "test", settings)[0]
    assert again == pytest.approx({name: result[name] for name in again})
    if store is not None:
        assert any(name.startswith("lum/") and name.endswith("/hr@10") for name in result)
    assert STAGES["retrieve"].run(config) == result  # finished: read, not trained again


def test_the_lums_own_figure_is_that_of_one_user_at_a_time(words, data):
    store = Knowledge.open(Path(load(None, words).runs_dir) / "tiny-query", data)
    targets = last_events(data, "test")
    result = knowledge_metrics(store, data, targets, [20])
    answers, hits = store.for_rows(targets.row_B.numpy()), 0
    for place, (row, first) in enumerate(zip(targets.row_B.tolist(), targets.first_B.tolist(), strict=True)):
        score_I = store.items_e[answers.fold_B[place]].float() @ answers.o_BND[place, 0]
        left = (data.item_counts > 0) & ~np.isin(np.arange(data.num_items), data.item[first:row])
        left[data.item[row]] = False
        ahead = int((score_I[torch.from_numpy(left)] >= score_I[data.item[row]]).sum())
        hits += ahead < 20 and data.item_counts[data.item[row]] > 0
    condition = ",".join(f"{name}={value}" for name, value in store.conditions[0].items()) or "no condition"
    assert result[f"lum/{condition}/hr@20"] == pytest.approx(hits / len(targets.row_B))


def planted(data: PreparedData) -> PreparedData:
    """The same log, but each item is followed by the next of the catalogue; a user's last event is the test."""
    log = copy.copy(data)
    place_E = np.arange(data.num_events) - data.user_offsets[data.user]
    log.item = ((7 * data.user + place_E) % data.num_items).astype(np.int64)
    from_end_E = data.user_offsets[data.user + 1] - 1 - np.arange(data.num_events)
    log.split = np.select([from_end_E == 0, from_end_E == 1], [TEST, VALID], TRAIN).astype(np.int8)
    log.item_counts = np.bincount(log.item[log.split == TRAIN], minlength=data.num_items)
    return log


def test_a_planted_signal_is_found(tiny_prepared):
    log = planted(tiny_prepared)
    config = RetrieveConfig(positives="all", max_history=10, batch_size=256, dropout=0.0, ks=[1, 5], select="hr@1")
    torch.manual_seed(0)
    towers, builder = build_towers(config, log)
    optimizer = OptimizerConfig(table_lr=0.1, dense_lr=1e-2)
    dmp = shard(towers, optimizer=optimizer, device=init_distributed("cpu"))
    adam, step = build_optimizer(dmp, optimizer), make_step(config)
    rows = np.flatnonzero(log.split == TRAIN)
    loader = TowerLoader(builder, rows, negatives=NegativesConfig(full=True), batch_size=256)
    for _ in range(15):
        for batch in loader:
            adam.zero_grad()
            (step(dmp, batch).loss_sum / len(batch)).backward()
            adam.step()
    found = retrieval_metrics(dmp, builder, "test", config)[0]
    assert found["hr@5"] > 0.95 and found["hr@1"] > 0.7
    assert found["retrieval_users"] == (np.diff(log.user_offsets) > 0).sum()


def test_training_rows_are_positive_events_of_the_training_part(data):
    config = RetrieveConfig()
    builder = build_towers(config, data)[1]
    rows = np.flatnonzero((data.split == TRAIN) & positive_events(config, data))
    assert (data.label[rows] == 1).all() and 0 < len(rows) < (data.split == TRAIN).sum()
    negatives = NegativesConfig(sampled=200)
    batches = list(TowerLoader(builder, rows, negatives=negatives, batch_size=64))
    assert sum(map(len, batches)) == len(rows)
    drawn = torch.cat([batch.candidate_item_C for batch in batches]).numpy()
    assert (data.item_counts[drawn] > 0).all()  # no item of the other parts alone
    targets = torch.cat([batch.candidate_item_C[batch.positive_B] for batch in batches]).numpy()
    assert np.array_equal(
        np.bincount(targets, minlength=data.num_items), np.bincount(data.item[rows], minlength=data.num_items)
    )


def test_a_user_vector_reads_nothing_of_its_row_or_later(data):
    """Item, label, feedback and conditions of the target and of all later events may be anything."""
    config = RetrieveConfig()
    assert not set(tower_features(config, data.schema)) & {"feedback", "categories"}
    torch.manual_seed(0)
    towers, builder = build_towers(config, data)
    dmp = shard(towers, device=init_distributed("cpu")).eval()
    rows = last_events(data, "valid").row_B.numpy()
    later = (data.split == VALID) | (data.split == TEST)
    assert later[rows].all()
    other = copy.copy(data)
    other.item, other.label = data.item.copy(), data.label.copy()
    other.item[later], other.label[later] = 0, 1 - data.label[later]
    index = torch.from_numpy(np.flatnonzero(later))
    context = {name for name, feature in data.schema.features.items() if feature.role == "context"}
    other.event_columns = dict(data.event_columns)
    for name, column in data.event_columns.items():
        if column.offsets is None and name not in context:
            values = column.values.clone()
            values[index] = 1
            other.event_columns[name] = Column(values)
    same = build_towers(config, other)[1]
    first, second = (user_vectors(dmp, one, rows, batch_size=32) for one in (builder, same))
    torch.testing.assert_close(first, second)
    earlier = np.flatnonzero(~later)
    other.item[earlier] = 0
    changed = user_vectors(dmp, build_towers(config, other)[1], rows, batch_size=32)
    assert not torch.allclose(first, changed)


def test_seen_items_are_never_recommended(data):
    """A retriever that has every seen item first still ranks the target as though they were not there."""
    targets = last_events(data, "test")
    first, row = targets.first_B[0].item(), targets.row_B[0].item()
    e_IV = torch.zeros(data.num_items, 1)
    e_IV[data.item[first:row]] = 2.0
    e_IV[data.item[row]] = 1.0
    one = targets.take(slice(1))
    expected = 1 if data.item_counts[data.item[row]] > 0 else data.num_items + 1
    assert rank_targets(torch.ones(1, 1), e_IV, data, one).tolist() == [expected]


def test_catalogue_vectors_do_not_depend_on_the_block(data, monkeypatch):
    towers, builder = build_towers(RetrieveConfig(), data)
    dmp = shard(towers, device=init_distributed("cpu")).eval()
    whole = item_vectors(dmp, builder)
    monkeypatch.setattr("lumrec.batches.tower_rows.ITEM_BLOCK", 17)
    torch.testing.assert_close(item_vectors(dmp, builder), whole)
    assert whole.shape == (data.num_items, 64)


def run_words(words: list[str]) -> None:
    STAGES["retrieve"].run(load(None, words))


@pytest.mark.parametrize(
    "negatives", [["full=true"], ["sampled=0", "across_ranks=true"]], ids=["full", "in_batch_across_ranks"]
)
def test_two_ranks_train_as_one(words, forks, negatives):
    """The same rows in each step, the same items against them: losses and metrics agree within rounding."""
    more = [*words, *(f"retrieve.negatives.{word}" for word in negatives), "retrieve.ann.index=", "threads=1"]
    more += ["retrieve.dropout=0", "retrieve.positives=all", "retrieve.select=", "retrieve.train.max_steps=8"]
    name = negatives[0].replace("=", "-")
    one = load(None, [*more, f"run=one-rank-{name}"])
    result = STAGES["retrieve"].run(one)
    two = folder_of(one).with_name(f"two-ranks-{name}")
    forks.run(
        "tests.stages.test_retrieve:run_words", world_size=2, words=[*more, f"run={two.name}", "retrieve.batch_size=64"]
    )
    assert losses_of(two) == pytest.approx(losses_of(folder_of(one)), rel=1e-4) and len(losses_of(two)) == 8
    other = json.loads((two / "result.json").read_text())
    assert other["retrieval_users"] == result["retrieval_users"]
    assert other["hr@50"] == pytest.approx(result["hr@50"], abs=0.04)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("retrieve.knowledge=both", "retrieve.knowledge: got 'both', expected one of none, direct"),
        ("retrieve.positives=some", "retrieve.positives: got 'some', expected one of label, all"),
        ("retrieve.conditions=[genre]", "retrieve.conditions: got 'genre'"),
        ("retrieve.label_smoothing=1", "expected at least 0 and less than 1"),
        ("retrieve.knowledge_dim=9", "retrieve.knowledge_dim=9 has no effect with retrieve.knowledge=none"),
    ],
)
def test_a_wrong_setting_is_refused(words, word, message):
    with pytest.raises(ValueError, match=message):
        STAGES["retrieve"].run(load(None, [*words, "run=refused", "overwrite=true", word]))


def test_missing_knowledge_names_the_command(words):
    with pytest.raises(FileNotFoundError, match=r"torchx run apps/query\.py"):
        STAGES["retrieve"].run(
            load(None, [*words, "run=missing", "retrieve.knowledge=direct", "inputs.knowledge=nowhere"])
        )
