"""Step 3 as a stage, on a small simulated log with real LUMs: with and without knowledge, on one rank and on two."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_knowledge import make_knowledge
from tiny_training import weights_of

from lumrec.batches.rows import RowBuilder, RowLoader
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TEST, TRAIN
from lumrec.evaluation.ranking import evaluate, score
from lumrec.experiments.config import Config, load
from lumrec.features.statistics import dense_inputs
from lumrec.knowledge.store import Knowledge
from lumrec.metrics.bootstrap import intervals
from lumrec.metrics.compare import compare_runs
from lumrec.models.lum import load_lum
from lumrec.models.ranker import build_ranker, build_rows, make_ranker, row_features
from lumrec.modules.rankers.base import Ranker
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.stages.rank import RankConfig, load_lum_tables, lum_of_tables
from lumrec.stages.registry import STAGES
from lumrec.train.checkpoint import best_checkpoint, load_weights
from lumrec.train.parallel import shard

ROOT = Path(__file__).parents[2]
WORDS = [
    "rank.batch_size=128",
    "rank.train.epochs=2",
    "rank.train.log_every=4",
    "rank.hidden_dims=[16]",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Words of a runs folder that holds prepared data, two cross-fitted LUMs and their knowledge."""
    return make_knowledge(tmp_path_factory.mktemp("rank"), *WORDS)


@pytest.fixture(scope="module")
def data(words) -> PreparedData:
    return PreparedData.open(Path(config_of(words).runs_dir) / "tiny-prepare")


def config_of(words: list[str], *more: str) -> Config:
    return load(None, [*words, *more])


def folder_of(config: Config) -> Path:
    return Path(config.runs_dir) / config.run


def builder_of(ranker, data: PreparedData, knowledge: Knowledge | None = None) -> RowBuilder:
    return build_rows(ranker, data, RankConfig(), dense_inputs(data), knowledge)


def test_what_is_computed_from_the_log_is_kept_beside_it_and_is_what_it_was(words, data):
    _, expected = make_ranker(RankConfig(), data)
    for _ in range(2):
        _, builder = make_ranker(RankConfig(), data, keep=True)
        for name in ("dense_RF", "token_E", "event_of_pair"):
            kept = getattr(builder, name)
            assert isinstance(kept, np.memmap) and np.array_equal(kept, getattr(expected, name)), name
        assert builder.statistics.model == expected.statistics.model
    before = {path.name for path in (data.path / "kept").iterdir()}
    make_ranker(RankConfig(leave_out=["query"]), data, keep=True)
    assert {path.name for path in (data.path / "kept").iterdir()} > before


def test_the_scores_are_kept_and_intervals_are_those_of_their_rows(words, data):
    config = config_of(words, "run=attending", "rank.knowledge=both", "rank.knowledge_attention=true")
    result, other = STAGES["rank"].run(config), config_of(words, "run=plain", "rank.model=dlrm")
    STAGES["rank"].run(other)
    scores, found = compare_runs(folder_of(config), folder_of(other), num_resamples=50)
    assert np.array_equal(scores.row_N, np.flatnonzero(data.split == TEST))
    assert np.array_equal(scores.label_N, data.label[scores.row_N])
    assert np.array_equal(scores.user_N, data.user[scores.row_N])
    for name, expected in intervals(scores.label_N, scores.logit_N, scores.user_N).items():
        got = tuple(result[key] for key in (name, f"{name}_low", f"{name}_high"))
        assert got == pytest.approx(expected, abs=1e-12) and got[1] <= got[0] <= got[2]
        assert found[name].a.value == pytest.approx(result[name], abs=1e-12)
    weights = dict(build(config, data).named_parameters())
    assert weights["knowledge.pooled_weight_KIF"].shape == (2, 16, config.rank.knowledge_dim)


def build(config: Config, data: PreparedData) -> Ranker:
    knowledge = Knowledge.open(Path(config.runs_dir) / "tiny-query", data)
    return build_ranker(config.rank, data, num_statistics=0, knowledge=knowledge)


EVERY = [(model, knowledge) for model in ("din", "dlrm") for knowledge in ("none", "direct", "matching", "both")]
EVERY += [("dien", "both"), ("sim", "both"), ("twin", "both")]


@pytest.mark.parametrize(("model", "knowledge"), EVERY)
def test_every_ranker_with_every_knowledge(words, data, model, knowledge, caplog):
    config = config_of(words, f"run={model}-{knowledge}", f"rank.model={model}", f"rank.knowledge={knowledge}")
    result = STAGES["rank"].run(config)
    assert ("so it leaves none out" in caplog.text) == (model in ("sim", "twin"))
    stored = json.loads((folder_of(config) / "result.json").read_text())
    assert stored == result and (result["model"], result["knowledge"]) == (model, knowledge)
    assert result["num_rows"] == (data.split == TEST).sum() and 0.3 < result["auc"] < 1
    assert {"gauc", "log_loss", "ne", "calibration", "ece", "num_users_skipped", "rows_per_s", "valid/auc"} <= set(
        result
    )
    assert result.get("knowledge_hazard") == (None if knowledge == "none" else "cross_fit")
    curve = [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in curve if "loss" in line]
    assert losses[-1] < losses[0]
    assert STAGES["rank"].run(config) == result  # finished: read, not trained again


def trained_model(config: Config, data: PreparedData):
    """The tested weights of a finished run, and its rows."""
    knowledge = None
    if config.rank.knowledge != "none":
        knowledge = Knowledge.open(Path(config.runs_dir) / "tiny-query", data)
    statistics = len(dense_inputs(data).names)
    torch.manual_seed(0)
    dmp = shard(build_ranker(config.rank, data, num_statistics=statistics, knowledge=knowledge), device="cpu")
    fresh = weights_of(dmp)
    load_weights(best_checkpoint(folder_of(config)), dmp)
    return dmp, fresh, builder_of(dmp.module, data, knowledge)


def test_every_table_and_matrix_moves_and_the_result_is_that_of_the_best_checkpoint(words, data):
    config = config_of(words, "run=moved", "rank.knowledge=both")
    result = STAGES["rank"].run(config)
    dmp, fresh, builder = trained_model(config, data)
    assert [name for name, value in weights_of(dmp).items() if torch.equal(value, fresh[name])] == []
    rows = np.flatnonzero(data.split == TEST)
    logits = score(dmp, builder, rows, batch_size=77)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.allclose(score(dmp, builder, rows[order], batch_size=50), logits[order], atol=1e-5)
    again = evaluate(dmp, builder, TEST, batch_size=50)
    assert {name: result[name] for name in again} == pytest.approx(again, abs=1e-6)


def test_tables_of_the_lum(words, data):
    """The shared tables start as the LUM's; the others, and the dense part, fresh."""
    config = config_of(words, "run=lum-tables", "rank.tables=lum", "inputs.lums=[tiny-pretrain-1of2]")
    device = init_distributed("cpu")
    dmp = shard(build_ranker(config.rank, data, num_statistics=0), device=device)
    before = weights_of(dmp)
    loaded = load_lum_tables(lum_of_tables(config).folder, data, dmp)
    assert loaded == ["item_id", "categories", "price_bucket", "clicked", "scenario", "query"]
    lum = weights_of(load_lum(config.runs / "tiny-pretrain-1of2", data, device=device)[0])
    for name, value in weights_of(dmp).items():
        table = name.split(".")[2] if name.startswith("tables.") else ""
        expected = lum[f"token_encoder.{name}"] if table in loaded else before[name]
        assert torch.equal(value, expected), name
    assert STAGES["rank"].run(config)["tables_from_lum"] == ", ".join(loaded)


def test_labels_of_the_test_part_change_no_training_batch(words, data):
    other = copy.copy(data)
    random, is_test = np.random.default_rng(0), data.split == TEST
    order = np.arange(data.num_events)
    order[is_test] = random.permutation(order[is_test])
    other.label = data.label[order]
    clicked = data.event_columns["clicked"].values[torch.from_numpy(order)]
    other.event_columns = {**data.event_columns, "clicked": Column(clicked), "feedback": Column(clicked)}
    torch.manual_seed(0)
    model = build_ranker(RankConfig(), data, num_statistics=len(dense_inputs(data).names))
    rows = np.flatnonzero(data.split == TRAIN)
    pairs = zip(*(RowLoader(builder_of(model, log), rows, batch_size=300) for log in (data, other)), strict=True)
    for batch, same in pairs:
        for name in ("target_B", "history_T", "offsets_B1", "dense_BF", "label_B", "row_B"):
            assert torch.equal(getattr(batch, name), getattr(same, name)), name
        assert torch.equal(batch.tokens.values(), same.tokens.values())
    assert not np.array_equal(data.label, other.label)


def test_a_rows_own_feedback_label_and_wish_are_not_read(words, data):
    """The scores of test rows stay when their own labels and feedback are turned around."""
    assert "feedback" not in row_features(data.schema) and "scenario" in row_features(data.schema)
    torch.manual_seed(0)
    model = build_ranker(RankConfig(), data, num_statistics=len(dense_inputs(data).names)).eval()
    last = data.user_offsets[1:][np.diff(data.user_offsets) > 0] - 1
    rows = last[data.split[last] == TEST]
    other = copy.copy(data)
    other.label = data.label.copy()
    other.label[rows] = 1 - data.label[rows]
    clicked = data.event_columns["clicked"].values.clone()
    clicked[torch.from_numpy(rows)] = 3 - clicked[torch.from_numpy(rows)]
    other.event_columns = {**data.event_columns, "clicked": Column(clicked), "feedback": Column(clicked)}
    with torch.no_grad():
        first, second = (model(builder_of(model, log).batch(rows)) for log in (data, other))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("model", ["din", "dien"])
def test_two_ranks_score_alike(words, data, forks, model):
    """A job of two processes runs through, and its result is what one process gets from its checkpoint."""
    settings = [f"run=two-ranks-{model}", f"rank.model={model}", "rank.knowledge=both", "rank.activation=dice"]
    config = config_of(words, *settings)
    more = [*settings, "threads=1", "rank.train.epochs=1", "rank.train.max_steps=5"]
    forks.run_script(ROOT / "apps" / "rank.py", *words, *more, world_size=2)
    result = json.loads((folder_of(config) / "result.json").read_text())
    dmp, _, builder = trained_model(config, data)
    again = evaluate(dmp, builder, TEST, batch_size=100)
    assert result["num_rows"] == again["num_rows"] > 0
    # Running moments of the two ranks are averaged for the evaluation; the checkpoint holds them so.
    assert result["auc"] == pytest.approx(again["auc"], abs=1e-6)
    assert result["log_loss"] == pytest.approx(again["log_loss"], abs=1e-6)


def test_no_validation_rows_and_no_test_rows_are_stated(words, tmp_path):
    words = [*words, f"runs_dir={tmp_path}", "data.split.kind=user", "data.split.fractions=[1, 0, 0]", "run=all"]
    result = STAGES["rank"].run(config_of(words, "rank.train.epochs=1", "rank.train.patience=3"))
    assert "validation part has no rows" in result["note"] and "no rows" in result["undefined"]
    assert math.isnan(result["auc"]) and result["num_rows"] == 0
    assert json.loads((tmp_path / "all" / "result.json").read_text())["auc"] is None


def test_one_class_only_is_stated(words, tmp_path):
    words = [*words, f"runs_dir={tmp_path}", "data.simulator.bias=-60", "run=zeros", "rank.train.epochs=1"]
    result = STAGES["rank"].run(config_of(words))
    assert "all" in result["undefined"] and "labels are 0" in result["undefined"]
    assert "auc is nan over the validation part" in result["note"]
    assert math.isnan(result["auc"]) and result["log_loss"] > 0


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("rank.model=dim", ValueError, "rank.model: got 'dim' .*expected one of din, dlrm, dien, sim, twin"),
        ("rank.model=twin rank.twin.category=taste", ValueError, "rank.twin.category: got 'taste'; the item features"),
        ("rank.leave_out=[item_id,categories,price_bucket]", ValueError, "leaves no item feature for the ranker"),
        (
            "rank.model=sim rank.sim.search=hard rank.leave_out=[categories] rank.sim.category=categories",
            ValueError,
            "that the ranker reads: 'item_id'",
        ),
        (
            "rank.model=sim rank.sim.search=quick",
            ValueError,
            "rank.sim.search: got 'quick', expected one of",
        ),
        ("rank.model=din rank.sim.search=hard", UserError, "^rank.sim.search=hard has no effect with rank.model=din: "),
        ("rank.knowledge_dim=8", UserError, "rank.knowledge_dim=8 has no effect with rank.knowledge=none: remove"),
        ("rank.model=sim rank.sim.category=categories", UserError, "no effect with rank.sim.search=soft"),
        ("rank.search=hard", UserError, "unknown key 'rank.search'; the nearest valid key is 'rank.sim.search'"),
        ("rank.knowledge=some", ValueError, "rank.knowledge: got 'some', expected one of none, direct"),
        ("rank.tables=warm", ValueError, "rank.tables: got 'warm', expected one of fresh, lum"),
        ("rank.statistics=few", ValueError, "'few', expected one of all, user, none"),
        ("rank.select=auk", ValueError, "auk"),
    ],
)
def test_a_wrong_setting_is_refused(words, word, error, message):
    with pytest.raises(error, match=message):
        STAGES["rank"].run(config_of(words, "run=refused", "overwrite=true", *word.split()))


def test_a_missing_input_names_the_command(words, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"torchx run apps/query\.py"):
        STAGES["rank"].run(config_of(words, "run=missing", "rank.knowledge=both", "inputs.knowledge=nowhere"))
    with pytest.raises(FileNotFoundError, match=r"torchx run apps/pretrain\.py"):
        STAGES["rank"].run(config_of(words, "run=missing-too", "rank.tables=lum", "inputs.lums=[nowhere]"))
