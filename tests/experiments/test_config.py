"""Defaults < YAML < words, and what a wrong key, value or file says."""

from pathlib import Path

import pytest
import torch

from lumrec.experiments.config import Config, load
from lumrec.models.lum import build_user_encoder
from lumrec.run.config_file import valid_keys
from lumrec.run.shipped import shipped_configs
from lumrec.run.typed_yaml import to_yaml

ROOT = Path(__file__).resolve().parents[2]


def message(*words, path=None):
    with pytest.raises(ValueError) as error:
        load(path, words)
    return str(error.value)


def test_defaults_then_yaml_then_words(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nmodel: {dim: 32, num_heads: 4}\npretrain: {train: {epochs: 5}}\n")
    config = load(file, ["model.dim=48", "run=here"])
    assert (config.seed, config.model.dim, config.model.num_heads, config.run) == (3, 48, 4, "here")
    assert config.pretrain.train.epochs == 5
    assert config.model.num_layers == Config().model.num_layers
    assert config.name == "mine"


def test_name_is_a_setting_too():
    assert load(None).name == "lumrec"
    assert load(None, ["name=x"]).name == "x"


def test_a_file_builds_on_another(tmp_path):
    (tmp_path / "below.yaml").write_text("seed: 1\nmodel: {dim: 32, num_heads: 4}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nmodel: {dim: 64}\n")
    config = load(tmp_path / "above.yaml")
    assert (config.seed, config.model.dim, config.model.num_heads, config.name) == (1, 64, 4, "above")


def test_a_config_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, beside = load("reproduce/ml-1m"), load(ROOT / "configs/reproduce/ml-1m.yaml")
    assert named == beside
    assert named.name == "ml-1m"
    (tmp_path / "mine.yaml").write_text("base: [simulator, models/19m]\nseed: 3\n")
    assert (load("mine.yaml").data.source, load("mine.yaml").seed) == ("simulator", 3)
    assert (
        load("mine.yaml").model.dim == load(ROOT / "configs/models/19m.yaml").model.dim != load("simulator").model.dim
    )


def test_an_unknown_name_says_which_is_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(path="ml1m").startswith("no config is named 'ml1m' (did you mean 'ml-1m'?)")
    assert "`lumrec configs` lists those that come with lumrec" in message(path="@@@")
    assert message(path="configs/ml-1m.yaml").endswith("; the config that comes with lumrec is: --config ml-1m")
    (tmp_path / "mine.yaml").write_text("base: simulater\n")
    assert "did you mean 'simulator'?" in message(path="mine.yaml")


def test_files_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "form a circle" in message(path=tmp_path / "a.yaml")


def test_lists_mappings_and_null():
    config = load(
        None,
        [
            "query.conditions=[{feedback: like}, {feedback: dislike, scenario: home}]",
            "pipeline.seeds=[0, 1]",
            "model.conditions=[]",
            "schema.features={item_id: {role: item}}",
            "schema.features.genres.role=item",
            "schema.features.genres.kind=multi",
            "pretrain.train.optimizer.dense_lr=3e-4",
        ],
    )
    assert config.query.conditions == [{"feedback": "like"}, {"feedback": "dislike", "scenario": "home"}]
    assert config.pipeline.seeds == [0, 1]
    assert config.model.conditions == []
    assert load(None, ["model.conditions=null"]).model.conditions is None
    assert list(config.schema.features) == ["item_id", "genres"]
    assert config.schema.features["genres"].kind == "multi"
    assert config.pretrain.train.optimizer.dense_lr == 3e-4


def test_text_stays_text():
    config = load(None, ["run=12", "name=on", "fold=0/2", "overwrite=true"])
    assert (config.run, config.name, config.fold, config.overwrite) == ("12", "on", "0/2", True)


def test_written_and_read_back(tmp_path):
    config = load(None, ["schema.features.item_id.role=item", "query.conditions=[{a: b}]", "inputs.lums=[x/y, z]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("model.dmi=3", "'model.dim'"),
        ("pretrain.trian.epochs=3", "'pretrain.train.epochs'"),
        ("epochs=3", "'pretrain.train.epochs' or 'rank.train.epochs'"),
        ("sede=1", "'seed'"),
        ("schema.features.genres.rloe=item", "'schema.features.<name>.role'"),
        ("dense_lr=1", "optimizer.dense_lr'"),
    ],
)
def test_unknown_key_names_the_nearest(word, nearest):
    text = message(word)
    assert f"unknown key '{word.split('=')[0]}'" in text
    assert nearest in text


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("rank: {droput: 0.1}\n")
    assert message(path=file) == f"{file}: unknown key 'rank.droput'; the nearest valid key is 'rank.dropout'"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.dim=wide", "model.dim: got 'wide', expected int"),
        ("pipeline.seeds=3", "pipeline.seeds: got '3', expected a list of int"),
        ("query.conditions=[1]", "query.conditions[0]: got '1', expected a mapping of keys"),
        ("rank.train=4", "rank.train: got '4', expected a section (a mapping of keys)"),
        ("seed=null", "seed: got 'null', expected int"),
        ("schema.features.x.kind=id", "schema.features.x.role is not given, and has no default"),
        ("model.dim", "got 'model.dim' on the command line; expected key=value"),
        ("pipeline.seeds=[1", "not a valid YAML list or mapping"),
    ],
)
def test_wrong_value_says_what_was_expected(word, says):
    assert says in message(word)


def test_missing_file_lists_those_there(tmp_path):
    (tmp_path / "ml-1m.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no config file .*ml1m.yaml.*there are: .*ml-1m.yaml"):
        load(tmp_path / "ml1m.yaml")


@pytest.mark.parametrize("text", ["seed: [1\n", "- 1\n- 2\n"])
def test_broken_file(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert "broken.yaml" in message(path=file)


def test_every_config_that_comes_with_lumrec_loads_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(shipped_configs()) > 30
    for name, file in shipped_configs().items():
        assert load(name).name == file.stem
        assert file.read_text().startswith("# "), f"{file} opens without a comment that says what it is for"


def test_valid_keys_are_those_of_the_code():
    keys = valid_keys(Config)
    assert {"run", "model.dim", "data.split.kind", "schema.tables.<name>.width", "pipeline.folds"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_a_file_builds_on_several_in_order(tmp_path):
    (tmp_path / "data.yaml").write_text("seed: 1\nmodel: {dim: 32, num_heads: 4}\n")
    (tmp_path / "size.yaml").write_text("model: {dim: 64}\n")
    (tmp_path / "above.yaml").write_text("base: [data.yaml, size.yaml]\nmodel: {num_layers: 3}\n")
    config = load(tmp_path / "above.yaml")
    assert (config.seed, config.model.dim, config.model.num_heads, config.model.num_layers) == (1, 64, 4, 3)


@pytest.mark.parametrize("size", ["19m", "100m", "300m", "1b", "3b", "7b"])
def test_a_size_has_the_parameters_of_its_name(size, pytestconfig):
    model = load(pytestconfig.rootpath / "configs" / "models" / f"{size}.yaml").model
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in build_user_encoder(model).parameters())
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert abs(counted / named - 1) < 0.05, counted
