"""Exports of LUMs and two towers by the command; those of rankers are in tests/serving/test_scorer.py."""

import json

import numpy as np
import pytest
import torch

from lumrec.experiments.config import load
from lumrec.models.lum import load_lum
from lumrec.models.towers import open_towers_run, plain_towers
from lumrec.query.group_query import GroupQuery, serving_windows
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.keys import Keys
from lumrec.serving.lum_graph import ExportedLum, lum_inputs
from lumrec.serving.scorer import Scorer
from lumrec.serving.tower_graph import Towers
from lumrec.stages.registry import STAGES


def export(words, *more):
    return STAGES["export"].run(load(None, [*words, *more]))


def test_a_lum_of_a_run_answers_from_its_bundle(served):
    result = export(served.words, "run=tiny-pretrain")
    assert result["model"] == "LUM" and result["golden_difference"] < 1e-5
    exported = ExportedLum(result["bundle"])
    lum, builder, trained = load_lum(served.runs / "tiny-pretrain")
    query = GroupQuery(lum, builder, [{"feedback": "like"}, {}], max_events=trained.model.max_events)
    user_B = torch.arange(builder.data.num_users)
    windows = serving_windows(builder.data, user_B, max_events=query.max_events)
    inputs = lum_inputs(query.pack(windows, query.asked, user_B), exported.spec)
    torch.testing.assert_close(exported(inputs), query.users(user_B), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(exported.items_ID, query.items(), atol=1e-6, rtol=1e-5)

    folder = served.runs / "tiny-pretrain-bundle" / str(result["version"])
    keys = Keys(folder, builder.data.table_rows, num_items=builder.data.num_items)
    assert keys.items(builder.data.item_keys()).tolist() == list(range(builder.data.num_items))
    assert export(served.words, "run=tiny-pretrain")["version"] == result["version"]
    with pytest.raises(UserError, match="holds a trained LUM, expected a ranker"):
        Scorer.open(served.runs / "tiny-pretrain-bundle")
    with pytest.raises(UserError, match="holds a trained ranker, expected a LUM"):
        ExportedLum(served.bundle)
    items = np.load(folder / "items.npy")
    items[0, 0] += 1
    np.save(folder / "items.npy", items)
    with pytest.raises(UserError, match="items.npy"):
        ExportedLum(served.runs / "tiny-pretrain-bundle")


def test_towers_of_a_run_give_their_vectors_from_their_bundle(served):
    words = [*served.words, "retrieve.train.max_steps=4", "retrieve.dim=8"]
    STAGES["retrieve"].run(load(None, [*words, "retrieve.knowledge=direct"]))
    half = export(words, "run=tiny-retrieve", "export.dtype=float16")
    result = export(words, "run=tiny-retrieve", "overwrite=true")
    assert result["model"] == "towers" and result["golden_difference"] < 1e-5 < half["golden_difference"]
    opened = Towers(result["bundle"])
    towers, builder = plain_towers(open_towers_run(served.runs / "tiny-retrieve"))
    batch = builder.towers(np.arange(50), np.arange(builder.data.num_items))
    with torch.no_grad():
        o_BV, e_CV = towers(batch)
    torch.testing.assert_close(opened.users(batch), o_BV, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(opened.items_IV, e_CV, atol=1e-6, rtol=1e-5)
    manifest = json.loads((served.runs / "tiny-retrieve-bundle/manifest.json").read_text())
    assert manifest["needs"]["conditions"] == [{"feedback": "like"}, {"feedback": "dislike"}]


@pytest.mark.parametrize("word", ["export.compile=aoti", "export.test_rows=5"])
def test_what_only_rankers_have_is_refused_before_anything_is_written(served, word):
    config = load(None, [*served.words, "run=tiny-pretrain", word])
    for refused in (STAGES["export"].check_inputs, STAGES["export"].run):
        with pytest.raises(UserError, match=f"{word.split('=')[0]} is for rankers"):
            refused(config)
    assert not (served.runs / "tiny-pretrain-bundle").exists()


def test_runs_that_cannot_be_exported_are_refused(served):
    with pytest.raises(UserError, match="tiny-query is a run of query, expected one of rank"):
        export(served.words, "run=tiny-query")
    (served.runs / "tiny-pretrain/result.json").unlink()
    with pytest.raises(MissingFileError, match="no finished LUM"):
        export(served.words, "run=tiny-pretrain")
