"""A LUM goes on from an earlier one: at step 0 it answers as that one did, and then all that is new learns."""

import dataclasses
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from tiny_training import local, weights_of
from torch import Tensor
from two_logs import ASKED, answers, config_of, write_logs

from lumrec.data.prepare import open_or_prepare, prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import Config
from lumrec.models.lum import build_lum, load_lum
from lumrec.run.distributed import init_distributed
from lumrec.stages.registry import STAGES
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard
from lumrec.warm_start.continual import PROJECTIONS, TABLES, find_earlier, start_from

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """Both logs, prepared, and a LUM trained on the first one."""
    folder = tmp_path_factory.mktemp("continual")
    write_logs(folder)
    STAGES["pretrain"].run(config_of(folder, "before"))
    for name in ("after", "grown"):
        open_or_prepare(config_of(folder, name))
    return folder


@pytest.fixture(scope="module")
def before(logs: Path) -> PreparedData:
    return PreparedData.open(logs / "runs" / "before-prepare")


def said(config: Config, before: PreparedData) -> tuple[Tensor, Tensor]:
    """Answers of the finished LUM of a config."""
    name = config.run or f"{config.name}-pretrain"
    lum, builder, _ = load_lum(config.runs / name, open_or_prepare(config), device=init_distributed("cpu"))
    return answers(lum, builder, before)


@pytest.fixture(scope="module")
def said_before(logs: Path, before: PreparedData) -> tuple[Tensor, Tensor]:
    return said(config_of(logs, "before"), before)


def started(config: Config, *, table_optimizer: str = "rowwise_adagrad", sharding: str = ""):
    """The LUM of a config at step 0, its pack builder, and what became of its parameters."""
    device = init_distributed("cpu")
    data = open_or_prepare(config)
    earlier = find_earlier(config, config.model, config.pretrain.start_from, data)
    torch.manual_seed(config.seed)
    model, builder = build_lum(config.model, data)
    optimizer = OptimizerConfig(table_optimizer=table_optimizer)
    dmp = shard(model, device=device, optimizer=optimizer, sharding=sharding)
    audit = start_from(dmp, earlier, config.model, data.schema, table_state=config.pretrain.table_state)
    return dmp, builder, audit


def table_states(lum: torch.nn.Module) -> dict[str, Tensor]:
    state = lum.fused_optimizer.state_dict()["state"]
    return local({name: value for name, entries in state.items() for value in entries.values()})


def test_more_events_items_users_and_a_new_value_change_no_answer(logs, before, said_before):
    lum, builder, audit = started(config_of(logs, "after"))
    data = builder.data
    assert data.num_users > before.num_users and data.num_items > before.num_items
    assert set(data.vocabulary("scenario")) - set(before.vocabulary("scenario")) == {"voice"}
    for now, then in zip(answers(lum, builder, before), said_before, strict=True):
        assert torch.equal(now, then)
    new_rows = {row.target: row.rows_new for row in audit.rows if row.rows_new}
    expected = {table: data.table_rows[table] - rows for table, rows in before.table_rows.items()}
    assert new_rows == {f"{TABLES}{table}.weight": rows for table, rows in expected.items() if rows}
    assert new_rows[f"{TABLES}item_id.weight"] > 5
    assert not any(row.columns_new for row in audit.rows)


def test_a_history_with_new_values_is_answered_as_they_were_unknown(logs, before):
    """Of all histories of the later log: with the earlier LUM's vocabulary, everything new is row 0."""
    lum, builder, _ = started(config_of(logs, "after"))
    now = answers(lum, builder, builder.data)
    data = open_or_prepare(config_of(logs, "after"))
    for columns, features in ((data.item_columns, data.schema.features), (data.event_columns, data.schema.features)):
        for name, column in columns.items():
            column.values[column.values >= before.table_rows[features[name].table]] = 0
    builder.data = data
    for one, other in zip(now, answers(lum, builder, data), strict=True):
        assert torch.equal(one, other)


def test_new_features_change_no_answer(logs, before, said_before):
    """A condition, an item feature and their tables; and the schema names all features in another order."""
    lum, builder, audit = started(config_of(logs, "grown"))
    for now, then in zip(answers(lum, builder, before), said_before, strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)
    columns = {row.target: row.columns_new for row in audit.rows if row.columns_new}
    assert columns == {PROJECTIONS["item"]: 16, PROJECTIONS["condition"]: 8 + 16}  # price_bucket; category and query
    drawn = weights_of(lum)[f"{TABLES}query.weight"]
    assert drawn[1:].std() > 0.1, "zero columns on a table of zeros would never learn"


def test_then_everything_that_is_new_learns(logs, before, capsys, caplog):
    config = config_of(logs, "grown")
    start = weights_of(started(config)[0])
    with caplog.at_level("INFO"):
        result = STAGES["pretrain"].run(config)
    assert result["loss"] > 0 and result["hr@10"] >= 0
    assert "continues from before-pretrain" in caplog.text and "other parameters are as they were" in caplog.text
    data = open_or_prepare(config)
    lum, _, _ = load_lum(config.runs / "grown-pretrain", data, device=init_distributed("cpu"))
    end = weights_of(lum)
    assert start.keys() == end.keys()
    for name, value in end.items():
        changed = (value != start[name]).any(tuple(range(1, value.dim()))) if value.dim() > 1 else value != start[name]
        if name.startswith(TABLES):
            table = name.removeprefix(TABLES).removesuffix(".weight")
            first_new = before.table_rows.get(table, 1)
            assert changed[first_new:].all(), f"{table}: rows that never learned"
            new = value[first_new:]
            assert len(new) == len(new.unique(dim=0)), f"{table}: rows that learned alike"
        assert changed.any(), name
    inputs = json.loads((logs / "runs" / "grown-pretrain" / "inputs.json").read_text())
    assert inputs["start_from"] == find_earlier(config, config.model, config.pretrain.start_from, data).fingerprint


def test_a_lum_without_any_condition_gets_its_first(logs, before):
    words = ["run=constant", "model.conditions=[]", "pretrain.train.max_steps=2"]
    STAGES["pretrain"].run(config_of(logs, "before", *words))
    device = init_distributed("cpu")
    lum, builder, _ = load_lum(config_of(logs, "before").runs / "constant", before, device=device)
    then = answers(lum, builder, before, asked=[{}])
    lum, builder, audit = started(config_of(logs, "grown", "pretrain.start_from=constant"))
    for condition in ASKED:
        for now, expected in zip(answers(lum, builder, before, asked=[condition]), then, strict=True):
            torch.testing.assert_close(now, expected, atol=1e-5, rtol=1e-5)
    assert "condition_constant" not in " ".join(row.target for row in audit.rows)


@pytest.mark.parametrize("table_optimizer", ["rowwise_adagrad", "adagrad"])
def test_the_state_of_known_rows_goes_on_or_begins_anew(logs, before, table_optimizer):
    words = [f"pretrain.train.optimizer.table_optimizer={table_optimizer}"]
    name = f"before-{table_optimizer}"
    STAGES["pretrain"].run(config_of(logs, "before", f"run={name}", "pretrain.train.max_steps=2", *words))
    config = config_of(logs, "after", f"pretrain.start_from={name}")
    kept = table_states(started(config, table_optimizer=table_optimizer)[0])
    assert kept
    for parameter, sums in kept.items():
        rows = before.table_rows[parameter.removeprefix(TABLES).removesuffix(".weight")]
        assert (sums[:rows] > 0).any() and not sums[rows:].any()
    fresh = config_of(logs, "after", f"pretrain.start_from={name}", "pretrain.table_state=fresh")
    assert not any(sums.any() for sums in table_states(started(fresh, table_optimizer=table_optimizer)[0]).values())


def test_on_two_ranks(logs, before, said_before, forks):
    """Tables and encoder sharded over ranks, from a checkpoint of one; and training that goes on from there."""
    forks.run_script(Path(__file__).parents[1] / "helpers" / "two_ranks_continual.py", str(logs), world_size=2)
    for sharding in ("row_wise", "table_wise", "column_wise"):
        for now, then in zip(torch.load(logs / f"answers-{sharding}.pt"), said_before, strict=True):
            torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)
    # What two ranks saved row-wise is taken by one, with the state of its tables.
    config = config_of(logs, "grown", "pretrain.start_from=two-ranks")
    lum, builder, audit = started(config)
    then = said(config_of(logs, "grown", "run=two-ranks"), before)
    for now, expected in zip(answers(lum, builder, before), then, strict=True):
        assert torch.equal(now, expected)
    assert not any(row.rows_new or row.columns_new for row in audit.rows)
    assert all((sums > 0).any() for sums in table_states(lum).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain.start_from=nowhere"], "no finished LUM in .*nowhere"),
        (["run=before-pretrain"], "is this run itself"),
        (
            ["model.dim=32", "model.encoder=llama"],
            "model.encoder is 'gpt' there, 'llama' here; model.dim is 16 there, 32",
        ),
        (["model.num_heads=1"], "model.num_heads is 2 there, 1 here"),
        (["model.max_events=32"], r"user_encoder.position.weight is \[32, 16\] there, \[64, 16\] here"),
        (["model.time_bias=true"], "user_encoder.biases.0.* is absent there"),
        (["model.conditions=[feedback]"], "it reads 'scenario' .condition., which this LUM does not"),
        (["schema.tables.item_id.width=32"], "table 'item_id' was 16 wide; now it is 32"),
        (["schema.features.scenario.role=context"], "it reads 'scenario' .condition., which this LUM does not"),
        (
            ["schema.features.scenario.table=feedback"],
            "'scenario' was condition, id, table scenario; now it is condition, id, table feedback",
        ),
        (["fold=0/2"], "fold=0/2 keeps users from this LUM, and before-pretrain .fold=.none.. has seen them"),
        (["data.vocabulary_from="], "has .* values elsewhere .* data.vocabulary_from=before-prepare"),
        (["data.split.kind=user"], "may have learned from events that this data holds out"),
    ],
)
def test_what_does_not_fit_is_refused(logs, words, message):
    config = config_of(logs, "after", *words)
    if any(word.startswith(("schema", "data")) for word in words):
        config = dataclasses.replace(config, name="other", overwrite=True)
        prepare(config, config.prepared)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        started(config)


def test_state_that_cannot_be_kept_is_refused(logs):
    config = config_of(logs, "after")
    for settings in ({"table_optimizer": "adagrad"}, {"sharding": "data_parallel"}):
        with pytest.raises(ValueError, match=r"optimizer state .* does not fit: .*pretrain.table_state=fresh"):
            started(config, **settings)
    fresh = config_of(logs, "after", "pretrain.table_state=fresh")
    started(fresh, table_optimizer="adagrad")
    started(fresh, sharding="data_parallel")


def test_the_earlier_log_must_be_as_it_was(logs, tmp_path):
    """The rows of a checkpoint mean nothing beside a vocabulary that was made anew."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(logs / "runs" / "before-pretrain", tmp_path / "runs" / "before-pretrain")
    shutil.copytree(logs / "runs" / "after-prepare", tmp_path / "runs" / "before-prepare")
    config = config_of(logs, "after", f"pretrain.start_from={tmp_path}/runs/before-pretrain")
    with pytest.raises(ValueError, match="before-prepare is not what .*before-pretrain was trained on"):
        started(config)
    shutil.rmtree(tmp_path / "runs" / "before-prepare")
    with pytest.raises(FileNotFoundError, match="before-prepare"):
        started(config)
    shutil.copytree(logs / "runs" / "before-prepare", tmp_path / "runs" / "before-prepare")
    started(config)


def test_each_fold_goes_on_from_its_own(logs):
    """With names as the pipeline gives them."""
    one_step = ["pretrain.train.max_steps=1", "fold=1/2"]
    STAGES["pretrain"].run(config_of(logs, "before", "run=old/lum-1of2", "inputs.prepared=before-prepare", *one_step))
    assert STAGES["pretrain"].run(config_of(logs, "after", "pretrain.start_from=old/lum-{fold}", *one_step))["loss"] > 0
    with pytest.raises(FileNotFoundError, match="old/lum-0of2"):
        STAGES["pretrain"].run(config_of(logs, "after", "fold=0/2", "pretrain.start_from=old/lum-{fold}"))
    with pytest.raises(ValueError, match="fold=0/2 keeps users"):
        STAGES["pretrain"].run(config_of(logs, "after", "fold=0/2", "pretrain.start_from=old/lum-1of2"))


def test_a_time_split_may_move_on_but_not_back(logs):
    times = pl.read_parquet(logs / "before.parquet")["timestamp"].cast(pl.Datetime("us"))
    first, second, third, last = (times.quantile(share).isoformat() for share in (0.3, 0.5, 0.7, 0.9))
    split = "data.split={{kind: time, times: ['{}', '{}']}}".format
    words = ["name=early", split(second, last), "pretrain.train.max_steps=1"]
    STAGES["pretrain"].run(config_of(logs, "before", *words))
    later = ["data.vocabulary_from=early-prepare", "pretrain.start_from=early-pretrain", "overwrite=true"]
    started(config_of(logs, "after", "name=later", *later, split(third, last)))
    with pytest.raises(ValueError, match="may have learned from events that this data holds out"):
        started(config_of(logs, "after", "name=back", *later, split(first, last)))
