"""A trained ranker from its run folder, also from one that an earlier version of lumrec wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_knowledge import make_knowledge

import lumrec
from lumrec.data.splits import TEST
from lumrec.evaluation.ranking import evaluate
from lumrec.experiments.config import load
from lumrec.metrics.compare import read_scores
from lumrec.models.lum import open_lum_run
from lumrec.models.towers import open_towers_run
from lumrec.run.changes import config_differences
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import sha256
from lumrec.stages.registry import STAGES

WORDS = ["rank.train.epochs=1", "rank.hidden_dims=[16]", "rank.batch_size=128"]
RUNS = {
    "din": ["rank.din.activation_dim=8", "rank.leave_out=[price_bucket]", "rank.statistics=user"],
    "nested/sim": ["rank.model=sim", "rank.sim.search=hard", "rank.sim.category=categories", "rank.knowledge=both"],
    "dlrm": ["rank.model=dlrm", "rank.dlrm.cross_dim=4", "rank.knowledge=matching"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with the rankers of RUNS, moved to where none of its configs says that it is; not to be changed."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    words = make_knowledge(runs, *WORDS)
    for name, more in RUNS.items():
        STAGES["rank"].run(load(None, [*words, f"run={name}", *more]))
    return Path(shutil.move(runs, tmp_path_factory.mktemp("moved")))


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.mark.parametrize("name", RUNS)
def test_it_scores_the_test_rows_as_its_result_says(trained, name):
    ranker, builder, run = lumrec.load_ranker(trained / name, device="cpu")
    result = json.loads((trained / name / "result.json").read_text())
    again = evaluate(ranker, builder, TEST, batch_size=100)
    for metric in ("auc", "gauc", "log_loss"):
        assert again[metric] == pytest.approx(result[metric], abs=1e-6)
    scores = read_scores(trained / name)
    with torch.no_grad():
        logit_B = ranker(builder.batch(scores.row_N[:50]))
    assert not ranker.training and run.config.model == name.rpartition("/")[2]
    assert np.allclose(logit_B, scores.logit_N[:50], atol=1e-5)


def to_the_layout_before_sections(run: Path) -> None:
    """config.yaml and checkpoints as versions before the rankers' sections wrote them: every setting beside `model`."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    rank = config["rank"]
    sections = {name: rank.pop(name) for name in ("twin", "dlrm", "dien", "din", "sim")}
    flat = {key: value for section in sections.values() for key, value in section.items()} | sections[rank["model"]]
    config["rank"] = rank | flat | {"knowledge_dim": 32 if rank["knowledge"] != "none" else 64}
    path.write_text(yaml.safe_dump(config))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        meta = json.loads((checkpoint / "meta.json").read_text())
        model = json.loads(meta["fingerprint"]["model"])
        flat = {key.rpartition(".")[2] if key.startswith(rank["model"]) else key: value for key, value in model.items()}
        meta["fingerprint"]["model"] = json.dumps(flat)
        (checkpoint / "meta.json").write_text(json.dumps(meta))
        (checkpoint / "COMPLETE").write_text(sha256(checkpoint / "meta.json"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_layout_before_sections_is_the_same_run(runs, name):
    to_the_layout_before_sections(runs / name)
    ranker, builder, _ = lumrec.load_ranker(runs / name, device="cpu")
    result = json.loads((runs / name / "result.json").read_text())
    assert evaluate(ranker, builder, TEST, batch_size=100)["auc"] == pytest.approx(result["auc"], abs=1e-6)
    words = ["name=tiny", f"runs_dir={runs}", f"run={name}", *WORDS, *RUNS[name]]
    assert [key for key in config_differences(runs / name, load(None, words)) if key.startswith("rank")] == []
    other = load(None, [*words, "rank.dropout=0.3"])
    assert [key for key in config_differences(runs / name, other) if key.startswith("rank")] == ["rank.dropout"]


@pytest.mark.parametrize("name", RUNS)
def test_an_unfinished_run_of_the_layout_before_sections_goes_on(runs, name):
    to_the_layout_before_sections(runs / name)
    before = json.loads((runs / name / "result.json").read_text())
    (runs / name / "result.json").unlink()
    words = make_knowledge(runs, *WORDS)  # finished: only words
    after = STAGES["rank"].run(load(None, [*words, f"run={name}", *RUNS[name]]))
    assert after["auc"] == pytest.approx(before["auc"], abs=1e-6) and after["best_step"] == before["best_step"]


def test_what_is_no_ranker_or_not_as_it_was_is_one_sentence(runs):
    with pytest.raises(MissingFileError, match=r"no finished ranker in .*nowhere; make it with: torchx run apps/rank"):
        lumrec.load_ranker(runs / "nowhere")
    with pytest.raises(UserError, match="is a run of pretrain, expected one of rank"):
        lumrec.load_ranker(runs / "tiny-pretrain-0of2")
    with pytest.raises(UserError, match="is a run of rank, expected one of pretrain: give the run folder of a LUM"):
        open_lum_run(runs / "din")
    with pytest.raises(UserError, match="is a run of query, expected one of retrieve: give the run folder of two tow"):
        open_towers_run(runs / "tiny-query")
    (runs / "dlrm" / "result.json").unlink()
    with pytest.raises(MissingFileError, match="no finished ranker"):
        lumrec.load_ranker(runs / "dlrm")
    config = runs / "din" / "config.yaml"
    config.write_text(config.read_text().replace("softmax: false", "softmax: true"))
    with pytest.raises(UserError, match="another model.*din.softmax is False there, True here"):
        lumrec.load_ranker(runs / "din", device="cpu")
    (runs / "tiny-query").rename(runs / "away")
    with pytest.raises(MissingFileError, match="tiny-query"):
        lumrec.load_ranker(runs / "nested" / "sim", device="cpu")
    (runs / "tiny-prepare").rename(runs / "data")
    with pytest.raises(MissingFileError, match="tiny-prepare"):
        lumrec.load_ranker(runs / "din", device="cpu")


def test_knowledge_that_was_made_again_is_refused(runs):
    make_knowledge(runs, *WORDS, "query.conditions=[{feedback: like}]", "overwrite=true")
    with pytest.raises(UserError, match="another knowledge"):
        lumrec.load_ranker(runs / "nested" / "sim", device="cpu")
