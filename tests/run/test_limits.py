"""Every key of the config, with values that no setting, or hardly any, can have: accepted with a meaning or refused."""

import dataclasses

import pytest

from lumrec.experiments.config import Config, load
from lumrec.launch.main import run_command
from lumrec.run import limits
from lumrec.run.config_file import valid_keys
from lumrec.run.errors import UserError
from lumrec.run.typed_yaml import field_types, section_of

LONG = "x" * 300
VALUES = ["-1", "0", "nan", "inf", "1e9", "1000000000", "", "[-1]", "[nan]", "{a: b}", "a\0b"]
# Settings of counts: more than a log or a machine has is as much as there is.
COUNTS = (
    *(
        "epochs",
        "max_steps",
        "min_steps",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_every",
        "patience",
    ),
    *("warmup_steps", "max_users", "tokens_per_pack", "top", "events", "lists", "probes", "min_count", "seed"),
    *("max_list_length", "num_users", "session_events", "plan.users", "plan.items", "plan.rows.<name>", "test_rows"),
)


def words_of(key, value):
    """The word that gives a key the value, and what else has to be there for the key to be read."""
    item = ["schema.features.item_id.role=item"] if key.startswith("schema.") and not key.endswith(".role") else []
    return [*item, f"{key.replace('<name>', 'din' if '.tuned.' in key else 'item_id')}={value}"]


def accepted(key, value):
    """Whether `load` takes a value; where it does not, it says why in one line that names the key."""
    try:
        load(None, words_of(key, value))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000
        assert key.split(".")[-1].replace("<name>", "") in message, message
        return False
    return True


def test_every_key_with_every_strange_value():
    taken = {key: [value for value in VALUES if accepted(key, value)] for key in valid_keys(Config)}
    kinds = {key: kind_of(key) for key in taken}
    assert len(taken) > 260
    for key, values in taken.items():
        assert key.endswith(".column") or "a\0b" not in values, key
        if kinds[key] in (int, float):
            assert not {"nan", "inf", "", "[-1]", "{a: b}"} & {*values} - (
                {""} if key.endswith("at_least") else set()
            ), key
        if kinds[key] is int and not key.endswith(COUNTS):
            assert "1000000000" not in values, f"{key}: what would that do?"
        if kinds[key] is int:
            assert "-1" not in values and "1e9" not in values, key
    assert [key for key, values in taken.items() if "-1" in values and kinds[key] is float] == [
        "data.label.at_least",
        "data.log.utc_offset_hours",
        *(f"data.simulator.{name}" for name in WEIGHTS),
    ]


WEIGHTS = ("bias", "propensity", "taste", "focus", "popularity", "price", "query", "freshness", "repeat")


def kind_of(key):
    """The type of a key, None where it is not a plain one."""
    kind = Config
    for name in key.split("."):
        kind = section_of(kind)
        kind = field_types(kind)[name] if dataclasses.is_dataclass(kind) else kind.__args__[-1]
    options = [option for option in getattr(kind, "__args__", ()) if option is not type(None)]
    return options[0] if len(options) == 1 and options[0] in (int, float) else kind if isinstance(kind, type) else None


def test_every_number_has_limits():
    def walk(kind, at):
        for each in dataclasses.fields(kind):
            hint = section_of(field_types(kind)[each.name])
            if dataclasses.is_dataclass(hint):
                yield from walk(hint, f"{at}.{each.name}")
            elif hint in (int, float) and "limits" not in each.metadata:
                yield f"{at}.{each.name}"

    assert list(walk(Config, "")) == []


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.dim=0", "model.dim: got 0, expected at least 1"),
        ("model.dim=1000000000", "model.dim: got 1000000000, expected at most 16,384"),
        ("model.num_heads=3", "model.num_heads: the width model.dim=64 cannot be divided into 3 heads"),
        ("model={encoder: llama, dim: 6, num_heads: 2}", "rotary positions turn pairs of channels"),
        ("model={encoder: hstu, ffn_dim: 8}", "an hstu block has no FFN"),
        ("model={dim: 16384, num_layers: 1024}", "parameters; expected at most 100,000,000,000"),
        ("model.dropout=1", "model.dropout: got 1.0, expected at least 0 and less than 1"),
        ("pretrain.packing.condition_dropout=2", "condition_dropout: got 2.0, expected at least 0 and at most 1"),
        ("pretrain.precision=float8", "pretrain.precision: got 'float8' (did you mean 'float32'?)"),
        ("pretrain.train.optimizer.table_lr=nan", "table_lr: got nan, expected a finite number"),
        ("rank.hidden_dims=[-1]", "rank.hidden_dims: got -1, expected at least 1"),
        ("rank.token_l2=-1", "rank.token_l2: got -1.0, expected at least 0"),
        ("rank.knowledge=bot", "rank.knowledge: got 'bot' (did you mean 'both'?)"),
        ("rank.select=log_loss", "rank.select: got 'log_loss' (did you mean '-log_loss'?)"),
        ("pretrain.select=foo", "pretrain.select: got 'foo', expected one of hr@10, hr@50, ndcg@10, ndcg@50"),
        ("pretrain={select: '', train: {patience: 2}}", "pretrain.train.patience=2 needs a metric to go by"),
        ("model={similarity: dot, temperature: 0.1}", "model.temperature=0.1 has no effect with model.similarity=dot"),
        ("rank={model: sim, sim: {auxiliary_weight: 0}}", "rank.sim.auxiliary_weight: got 0"),
        ("rank.time_window=[0.5, 0.5]", "rank.time_window: got [0.5, 0.5], expected two shares"),
        ("retrieve.ann.links=0", "retrieve.ann.links: got 0, expected at least 2"),
        ("pretrain.warm_start.source=x", "a warm start needs both"),
        ("pipeline.folds=1000", "pipeline.folds: got 1000, expected at most 127"),
        ("fold=0/200", "2 ≤ K ≤ 127"),
        ("threads=-1", "threads: got -1, expected at least 0"),
        ("data.label.at_least=nan", "data.label.at_least: got nan, expected a finite number"),
        ("data.log.encoding=zip", "data.log.encoding: got 'zip', expected the name of an encoding"),
        ("tune.space=[rank.dropout]", "tune.space: got 'rank.dropout'; expected key=a|b|c"),
        ("run=../../x", "run: got '../../x', of which '..' begins with a dot"),
        ("run=/tmp/x", "run: got '/tmp/x', of which '' is empty"),
        ("run=a//b", "of which '' is empty"),
        ("run=-x", "begins with -, which commands take for an option"),
        ("run=a/./b", "begins with a dot"),
        (f"run={LONG}", "is longer than 180 bytes"),
        ("run=a\nb", "contains a character that cannot be printed"),
        ("run=a\0b", "NUL byte"),
        ("run=\ud800", "not valid UTF-8"),
        ("name=a/b", "name: got 'a/b', expected one name, without /"),
        ("runs_dir=", "runs_dir: got ''"),
        ("inputs.lums=['']", "inputs.lums: got [''], expected the names of runs"),
    ],
)
def test_what_is_refused_says_why_and_nothing_is_written(word, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command("pretrain", [word])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in said and len(said.splitlines()) == 1, said
    assert list(tmp_path.iterdir()) == []


def test_a_config_made_in_python_is_checked_too():
    config = dataclasses.replace(load(None), seed=-1)
    with pytest.raises(UserError, match="seed: got -1, expected at least 0"):
        limits.check(config)
