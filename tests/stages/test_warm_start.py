"""A ranker of apps/rank.py that begins from a checkpoint, and the dry run of apps/warm_start.py."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import Config, load
from lumrec.launch.main import run_command
from lumrec.stages import rank
from lumrec.stages.registry import STAGES
from lumrec.train.checkpoint import best_checkpoint
from lumrec.warm_start import open_source

RULES = """
source_prefix: model.
optimizer_prefix: optim.
rules:
  - {source: "", match: prefix}
"""


@pytest.fixture(scope="module")
def words(tiny_words, tmp_path_factory) -> list[str]:
    """Words of a runs folder that holds prepared data and "production", a ranker that is trained already."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "rules.yaml").write_text(RULES)
    words = [*tiny_words, f"runs_dir={folder}", "rank.model=dlrm", "rank.train.epochs=1"]
    STAGES["rank"].run(load(None, [*words, "run=production"]))
    return words


def config(words: list[str], *more: str) -> Config:
    return load(None, [*words, *more])


def from_production(words: list[str], rules: str = "rules.yaml") -> list[str]:
    folder = Path(config(words).runs_dir)
    source = best_checkpoint(folder / "production")
    return [*words, f"rank.warm_start.source={source}", f"rank.warm_start.rules={folder / rules}"]


def test_a_ranker_goes_on_where_production_stands(words):
    folder = Path(config(words).runs_dir)
    still = ["rank.train.optimizer.table_lr=0", "rank.train.optimizer.dense_lr=0"]
    result = STAGES["rank"].run(config(from_production(words), "run=warm", *still))
    production = json.loads((folder / "production" / "result.json").read_text())
    assert result["auc"] == pytest.approx(production["auc"], abs=1e-9)
    assert result["warm_start"] == str(best_checkpoint(folder / "production"))
    audit = json.loads((folder / "warm" / "warm_start.json").read_text())
    tables = [row for row in audit["rows"] if ".embedding_bags." in row["target"]]
    assert tables and all(row["optimizer"] == "kept" and row["rows_new"] == 0 for row in tables)
    assert audit["applied"] and audit["fresh"] == audit["unused"] == []
    assert "| tables.embedding_bags.item_id.weight | model.tables" in (folder / "warm" / "warm_start.md").read_text()
    cold = STAGES["rank"].run(config(words, "run=cold", *still))
    assert abs(cold["auc"] - production["auc"]) > 1e-3


def test_the_app_prints_the_audit_and_changes_nothing(words, capsys):
    run_command("warm_start", from_production(words))
    out = capsys.readouterr().out
    assert "dry run, nothing is changed" in out and "tables.embedding_bags.item_id.weight" in out
    assert not (Path(config(words).runs_dir) / "tiny-warm_start").exists()


def test_the_app_says_what_does_not_fit(words, capsys):
    (Path(config(words).runs_dir) / "tables.yaml").write_text(RULES.replace('""', "tables"))
    with pytest.raises(SystemExit, match="2"):
        run_command("warm_start", from_production(words, "tables.yaml"))
    out, err = capsys.readouterr()
    assert "tables.embedding_bags.item_id.weight" in out
    assert "has no source; the nearest is" in err and "is left over" in err


class Cut(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_where_it_stood(words, monkeypatch):
    """Not from production again: each step is taken once, and the end is that of a run that nothing cut."""
    folder, often = Path(config(words).runs_dir), "rank.train.checkpoint_every=1"
    whole = STAGES["rank"].run(config(from_production(words), "run=whole", often))
    step, steps = rank.step, 0

    def cut(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Cut
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(rank, "step", cut)
        STAGES["rank"].run(config(from_production(words), "run=cut", often))
    resumed = STAGES["rank"].run(config(from_production(words), "run=cut", often))
    assert resumed["auc"] == pytest.approx(whole["auc"], abs=1e-12)
    expected, got = tables_of(folder / "whole"), tables_of(folder / "cut")
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    production = tables_of(folder / "production")
    assert not torch.equal(production["item_id"], expected["item_id"])


LUM_RULES = """
source_prefix: model.
optimizer_prefix: optim.
rules:
  - {source: tables., match: prefix, target: token_encoder.tables., exclude: [EXCLUDED]}
unused: ["[!t]*", EXCLUDED]
fresh: ["token_encoder.[!t]*", "user_encoder.*", "output.*", "token_encoder.tables.embedding_bags.feedback.*"]
"""


def for_lum(words: list[str]) -> list[str]:
    """Words of a LUM whose tables begin as production's ranker has them."""
    folder = Path(config(words).runs_dir)
    others = ["hour", "weekday", "segment", "segment_category", "scenario_price"]  # what a LUM does not read
    excluded = ", ".join(f"tables.embedding_bags.{name}.weight" for name in others)
    (folder / "lum.yaml").write_text(LUM_RULES.replace("EXCLUDED", excluded))
    source = f"pretrain.warm_start.source={folder / 'production'}"
    return [*words, source, f"pretrain.warm_start.rules={folder / 'lum.yaml'}"]


def tables_of(run: Path) -> dict[str, torch.Tensor]:
    """Weight of each table of a run's kept checkpoint, by the table's name."""
    source = open_source(best_checkpoint(run))
    return {
        name.split(".")[-2]: source.read(name, 0, tensor.size[0])
        for name, tensor in source.tensors.items()
        if ".embedding_bags." in name and name.startswith("model.")
    }


def test_a_lum_begins_from_the_tables_of_an_online_model(words, capsys):
    folder = Path(config(words).runs_dir)
    run_command("warm_start", for_lum(words))
    assert "token_encoder.tables.embedding_bags.item_id.weight" in capsys.readouterr().out
    frozen = "pretrain.train.optimizer.table_lrs={item_id: 0.0, query: 0.0}"
    result = STAGES["pretrain"].run(config(for_lum(words), "run=warm-lum", frozen))
    assert result["warm_start"] == str(best_checkpoint(folder / "production"))
    audit = json.loads((folder / "warm-lum" / "warm_start.json").read_text())
    assert audit["applied"]
    production, lum = tables_of(folder / "production"), tables_of(folder / "warm-lum")
    assert torch.equal(lum["item_id"], production["item_id"]) and torch.equal(lum["query"], production["query"])
    assert not torch.equal(lum["scenario"], production["scenario"])  # this one trains
    with pytest.raises(ValueError, match="both fill the weights"):
        STAGES["pretrain"].run(config(for_lum(words), "run=both-lum", "pretrain.start_from=warm-lum"))


def test_contradictions(words):
    with pytest.raises(ValueError, match="both fill the tables"):
        STAGES["rank"].run(config(from_production(words), "rank.tables=lum", "run=both"))
    with pytest.raises(ValueError, match="source is 'somewhere' and rank.warm_start.rules ''"):
        STAGES["rank"].run(config(words, "rank.warm_start.source=somewhere", "run=half"))
    with pytest.raises(FileNotFoundError, match="there is no somewhere; expected a DCP folder"):
        more = ("rank.warm_start.source=somewhere", "rank.warm_start.rules=rules.yaml")
        STAGES["rank"].run(config(words, *more, "run=nowhere"))
    with pytest.raises(ValueError, match="there is no warm start to check"):
        config(words, "rank.warm_start.scores=said.csv")
    with pytest.raises(ValueError, match="a LUM has none"):
        config(for_lum(words), "pretrain.warm_start.scores=said.csv")
    with pytest.raises(ValueError, match="there is nothing to compare"):
        config(from_production(words), "rank.warm_start.tolerance=.1")


def said_by_production(words: list[str], path: Path) -> str:
    """The word of a file of raw ids with production's logits of its test rows."""
    folder = Path(config(words).runs_dir)
    scores = pl.read_parquet(folder / "production" / "scores.parquet")
    data = PreparedData.open(folder / "tiny-prepare")
    event_N, item_N, _ = data.rows(scores["row"].to_numpy())
    users, items = data.user_keys(), data.item_keys()
    columns = {
        "user": [users[user] for user in data.user[event_N]],
        "item": [items[item] for item in item_N],
        "timestamp": data.timestamp[event_N],
        "logit": scores["logit"],
    }
    frame = pl.DataFrame(columns).unique(["user", "item", "timestamp"], keep="none", maintain_order=True)
    if path.suffix == ".csv":  # the other form: probabilities
        frame = frame.with_columns(score=1 / (1 + (-pl.col("logit")).exp())).drop("logit")
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return f"rank.warm_start.scores={path}"


OTHER = """
source_prefix: model.
optimizer_prefix: optim.
rules:
  - {source: "", match: prefix, exclude: ["tables.embedding_bags.item_id.weight"]}
unused: ["tables.embedding_bags.item_id.weight"]
fresh: ["tables.embedding_bags.item_id.weight"]
"""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_scores_of_production_accept_a_takeover_or_refuse_it(words, tmp_path, capsys, suffix):
    folder = Path(config(words).runs_dir)
    (folder / "other.yaml").write_text(OTHER)
    scores, run = said_by_production(words, tmp_path / f"said.{suffix}"), f"run=checked-{suffix}"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_command("warm_start", [*from_production(words, "other.yaml"), scores])
    assert "scores differ from production's by more than 1e-05" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_command("rank", [*from_production(words, "other.yaml"), scores, run])
    err = capsys.readouterr().err
    assert "scores differ from production's" in err and "the model is filled and must not be used" in err
    left = {path.name for path in (folder / f"checked-{suffix}").rglob("*")}
    assert not left & {"warm_start.json", "warm_start.md", "checkpoints", "result.json", "metrics.jsonl"}, left

    run_command("warm_start", [*from_production(words), scores])
    assert "scores equal production's" in capsys.readouterr().out
    STAGES["rank"].run(config(from_production(words), scores, run))  # the corrected command goes on in the same run
    audit = json.loads((folder / f"checked-{suffix}" / "warm_start.json").read_text())
    assert audit["applied"] and audit["checked"] > 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "rank.warm_start.scores: there is no .*said.csv"),
        ("user,item\n1,2\n", "expected one of score and logit"),
        ("user,item,score,logit\n1,2,.5,.1\n", "expected one of score and logit"),
        ("user,score\n1,.5\n", "has no column 'item'"),
        ("user,item,score\n", "has no rows"),
        ("user,item,score\nU,I,1.5\n", "score has 1.5 to 1.5, expected probabilities"),
        ("user,item,logit\nU,I,inf\n", "without user, item or a finite logit"),
        ("user,item,logit\nU,I,\n", "without user, item or a finite logit"),
        ("user,item,logit\nU,I,high\n", "expected numbers as logit"),
        ("user,item,timestamp,logit\nU,I,2024-05-20,1\n", "whole seconds as timestamp"),
        ("user,item,timestamp,logit\nU,I,1.5,1\n", "timestamp holds Float64; expected whole seconds"),
        ("user,item,logit\nU,nobody,1\nV,I,1\n", "2 of 2 rows are no event of the prepared log, such as user 'U'"),
    ],
)
def test_files_of_scores_that_are_wrong(words, tmp_path, text, said):
    path = tmp_path / "said.csv"
    if text is not None:
        path.write_text(text)
    folder = Path(config(words).runs_dir)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        STAGES["rank"].run(config(from_production(words), f"rank.warm_start.scores={path}", "run=wrong-scores"))
    assert not (folder / "wrong-scores").exists()


def test_a_changed_source_of_the_optimizer_or_rules_is_another_warm_start(words, tmp_path):
    folder = Path(config(words).runs_dir)
    best = best_checkpoint(folder / "production")
    shutil.copytree(best, tmp_path / "optim")
    text = RULES.replace("optimizer_prefix", f"optimizer_source: {tmp_path / 'optim'}\noptimizer_prefix")
    (folder / "second.yaml").write_text(text + "unused: [optim.*]\n")
    settings = config(from_production(words, "second.yaml")).rank.warm_start
    source = settings.open()
    first = settings.fingerprint(source)
    assert settings.fingerprint(source) == first != config(from_production(words)).rank.warm_start.fingerprint(source)
    STAGES["rank"].run(config(from_production(words, "second.yaml"), "run=second"))
    STAGES["rank"].run(config(words, "run=longer", "rank.train.epochs=2"))
    shutil.rmtree(tmp_path / "optim")
    shutil.copytree(best_checkpoint(folder / "longer"), tmp_path / "optim")
    assert settings.fingerprint(source) != first
    with pytest.raises(ValueError, match="input warm_start"):
        STAGES["rank"].run(config(from_production(words, "second.yaml"), "run=second"))
    (folder / "second.yaml").write_text(RULES.replace("prefix}", "prefix, optimizer: drop}"))
    with pytest.raises(ValueError, match="input warm_start"):
        STAGES["rank"].run(config(from_production(words, "second.yaml"), "run=second"))


ITEM = "tables.embedding_bags.item_id.weight"
BY_ID = "rows: remap, new_rows: mean, keep_rows: [0], source_vocabulary: {old}, target_vocabulary: {new}"


def with_rule(words: list[str], name: str, rule: str, more: str = "") -> list[str]:
    """Words of a ranker that takes the table of items by another rule than everything else."""
    rest = RULES.replace("prefix}", f'prefix, exclude: ["{ITEM}"]}}')
    text = f"{rest}  - {{source: {ITEM}, {rule}}}\n{more}"
    (Path(config(words).runs_dir) / f"{name}.yaml").write_text(text)
    return from_production(words, f"{name}.yaml")


@pytest.mark.parametrize(
    ("rule", "more", "said"),
    [
        (
            "target: tables.embedding_bags.itm_id.weight",
            "",
            "bags.itm_id.weight', which the model does not have; the nearest",
        ),
        (
            "match: regex, target: 'x'",
            f"fresh: [{ITEM.replace('id', 'idd')}]",
            "fresh lists 'tables.*item_idd.weight', which matches nothing",
        ),
        ("match: prefix, exclude: ['*']", "", "'tables.embedding_bags.item_id.weight' .prefix. matches nothing"),
        ("", "unused: [tabels.*]", "unused lists 'tabels..', which matches nothing"),
        (BY_ID.format(old="{folder}/old.csv", new="{folder}/new.csv"), "", "target_vocabulary: there is no .*new.csv"),
        (
            BY_ID.format(old="{folder}/nowhere.csv", new="{folder}/old.csv"),
            "",
            "source_vocabulary: there is no .*nowhe",
        ),
        (
            BY_ID.format(old="{folder}", new="{folder}/old.csv"),
            "",
            "source_vocabulary: .* is a folder; expected Parquet",
        ),
        (
            BY_ID.format(old="{folder}/old.csv", new="{runs}/tiny-prepare/vocabulary/items.parquet"),
            "",
            "target_vocabulary is .*items.parquet, but that of 'tables.*item_id.weight' is .*/item_id.parquet",
        ),
        ("check: '{folder}/link'", "", "check: there is no .*link .it is a link to .*gone"),
        ("optimizer_kind: adam", "", None),  # a rule that only the numbers can refuse
    ],
)
def test_rules_that_cannot_fit_are_refused_before_data_are_prepared(words, tmp_path, rule, more, said):
    (tmp_path / "old.csv").write_text("key,row\n1,1\n")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (runs := tmp_path / "runs").mkdir()
    rule = rule.replace("{folder}", str(tmp_path)).replace("{runs}", str(runs))
    given = [*with_rule(words, tmp_path.name, rule, more), f"runs_dir={runs}"]
    for stage in ("rank", "warm_start") if said else ():
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            STAGES[stage].run(config(given, "run=early"))
        assert not list(runs.iterdir())
    if not said:
        with pytest.raises(ValueError, match="the rule says optimizer_kind=adam"):
            STAGES["warm_start"].run(config(given))
        assert (runs / "tiny-prepare").is_dir()


EARLY = [
    ("rank", ["rank.train.sharding=PLAN"], "this model has no table 'itme_id'.*item_id"),
    ("pretrain", ["pretrain.train.sharding=PLAN"], "this model has no table 'itme_id'"),
    ("retrieve", ["retrieve.train.sharding=PLAN"], "this model has no table 'itme_id'"),
    ("rank", ["rank.train.sharding=."], "sharding: . is a folder; expected a YAML file"),
    ("rank", ["rank.train.optimizer.table_lrs={segment: .1}", "rank.leave_out=[segment]"], "table_lrs: got 'segment'"),
    ("pretrain", ["pretrain.train.optimizer.table_lrs={segment: .1}"], "got 'segment'.*tables that this model reads"),
    ("rank", ["rank.leave_out=[itm]"], "rank.leave_out: got 'itm'"),
    (
        "rank",
        ["rank.model=twin", "rank.leave_out=[categories]"],
        "rank.twin.category: got '', which is the first",
    ),
    ("rank", ["rank.model=sim", "rank.sim.search=hard", "rank.leave_out=[categories]"], "rank.sim.category: got ''"),
    ("rank", ["rank.train.fsdp=true"], "rank.train.fsdp=true shards the blocks of a user encoder"),
    ("retrieve", ["retrieve.conditions=[scenrio]"], "retrieve.conditions: got 'scenrio' .did you mean 'scenario'"),
    ("pretrain", ["pretrain.evaluate.condition={fedback: like}"], "got 'fedback' .did you mean 'feedback'"),
    ("pretrain", ["model.conditions=[fedback]"], "model.conditions names"),
]


@pytest.mark.parametrize(("stage", "more", "said"), EARLY)
def test_names_that_the_schema_lacks_are_refused_before_data_are_prepared(tiny_words, tmp_path, stage, more, said):
    (tmp_path / "plan.yaml").write_text("itme_id: table_wise\n")
    (runs := tmp_path / "runs").mkdir()
    given = [*tiny_words, f"runs_dir={runs}", *(word.replace("PLAN", str(tmp_path / "plan.yaml")) for word in more)]
    with pytest.raises(ValueError, match=said):
        STAGES[stage].run(config(given))
    assert not list(runs.iterdir())


@pytest.mark.parametrize(
    ("score", "said"), [("1.5", "expected probabilities"), ("", "finite score"), (None, "a folder")]
)
def test_scores_are_looked_at_before_data_are_prepared(words, tmp_path, score, said):
    path = tmp_path / "said.csv"
    path.mkdir() if score is None else path.write_text(f"user,item,score\nU,I,{score}\n")
    (runs := tmp_path / "runs").mkdir()
    given = [*from_production(words), f"rank.warm_start.scores={path}", f"runs_dir={runs}"]
    with pytest.raises(ValueError, match=said):
        STAGES["rank"].run(config(given))
    assert not list(runs.iterdir())


def test_a_vocabulary_of_other_data_is_refused(words, tmp_path):
    """The rows of data that were prepared another time are other ones, and as many."""
    folder = Path(config(words).runs_dir)
    vocabulary = folder / "tiny-prepare" / "vocabulary" / "item_id.parquet"
    frame = pl.read_parquet(vocabulary)
    frame.with_columns(row=pl.col("row").reverse()).write_parquet(tmp_path / "stale.parquet")
    rule = BY_ID.format(old=vocabulary, new=tmp_path / "stale.parquet")
    for stage in ("warm_start", "rank"):
        with pytest.raises(ValueError, match=r"stale.parquet is not that of .*54 of 55 raw ids have another row there"):
            STAGES[stage].run(config(with_rule(words, "stale", rule), "run=stale"))
    frame.write_parquet(tmp_path / "stale.parquet")
    STAGES["warm_start"].run(config(with_rule(words, "stale", rule)))


def test_a_run_never_replaces_what_it_reads(words, tmp_path):
    """With overwrite=true its folder is emptied first: the checkpoint, the rules or the plan were lost."""
    folder = Path(config(words).runs_dir)
    shutil.copytree(folder / "production", folder / "own")
    (folder / "own" / "rules.yaml").write_text(RULES)
    (folder / "own" / "plan.json").write_text('{"item_id": "table_wise"}')
    again = ["run=own", "overwrite=true"]
    (folder / "link").symlink_to(folder / "own")
    for stage, given, key in [
        ("rank", [f"rank.warm_start.source={folder / 'own'}"], "rank.warm_start.source"),
        ("rank", [f"rank.warm_start.source={best_checkpoint(folder / 'own')}"], "rank.warm_start.source"),
        ("rank", [f"rank.warm_start.source={folder / 'link'}"], "rank.warm_start.source"),
        ("rank", [f"rank.warm_start.rules={folder / 'own' / 'rules.yaml'}"], "rank.warm_start.rules"),
        ("rank", [f"rank.train.sharding={folder / 'own' / 'plan.json'}"], "rank.train.sharding"),
        ("pretrain", [f"pretrain.train.sharding={folder / 'own' / 'plan.json'}"], "pretrain.train.sharding"),
    ]:
        before = sorted(path.name for path in (folder / "own").rglob("*"))
        with pytest.raises(ValueError, match=f"{key}: .* lies in .*own, the folder of this run itself; choose another"):
            STAGES[stage].run(config(from_production(words), *again, *given))
        assert sorted(path.name for path in (folder / "own").rglob("*")) == before


def test_the_dry_run_needs_a_source(words):
    with pytest.raises(ValueError, match="give rank.warm_start.source, or pretrain.warm_start.source"):
        STAGES["warm_start"].run(config(words))
