"""A bundle through the Scorer: equal to the offline scores of every test row, and refused where anything differs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from small_bundle import WORDS, score_rows

import lumrec
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.metrics.compare import read_scores
from lumrec.models.ranker_config import RANKERS
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.listed_files import listed, own_hash
from lumrec.serving.requests import ScoreRequest
from lumrec.serving.scorer import Scorer
from lumrec.stages.registry import STAGES

OF_RANKERS = {name: [] for name in RANKERS}
OF_RANKERS |= {
    "sim": ["rank.sim.search=hard", "rank.sim.num_searched=5", "rank.sim.num_recent=3"],
    "twin": ["rank.twin.num_searched=5"],
    "dlrm": ["rank.knowledge=none", "rank.statistics=user", "rank.leave_out=[hour]"],
}


@pytest.mark.parametrize("ranker", OF_RANKERS)
def test_every_test_row_has_its_offline_score(served, ranker):
    words = [*served.words, f"rank.model={ranker}", f"run={ranker}", *OF_RANKERS[ranker]]
    STAGES["rank"].run(load(None, words))
    result = STAGES["export"].run(load(None, [*words, "export.test_rows=50"]))
    assert result["test_rows"] == 50 and result["test_difference"] <= 1e-6
    assert abs(result["auc_change"]) <= 1e-9 and result["auc_change_low"] <= 0 <= result["auc_change_high"]
    scorer = Scorer.open(served.runs / f"{ranker}-bundle", store=served.store)
    card = (scorer.bundle.folder / "MODEL_CARD.md").read_text()
    assert "Over 50 test rows a score differs by up to" in card and "AUC changes by +0.000000" in card
    offline = read_scores(served.runs / ranker)
    scored = score_rows(scorer, served.runs / ranker, offline.row_N)
    assert len(scored) > 200 and not any(each.unknown_user for each in scored)
    if scorer.needs_knowledge:
        assert np.mean([each.knowledge_present for each in scored]) > 0.5
    expected = 1 / (1 + np.exp(-offline.logit_N))
    np.testing.assert_allclose([each.scores[0] for each in scored], expected, rtol=0, atol=1e-6)


def test_what_a_user_sees(served):
    scorer = lumrec.Scorer.open(served.bundle, store=served.store)
    keys, titles = scorer.bundle.titles()
    data = PreparedData.open(served.runs / "tiny-prepare")
    assert (keys, titles) == (data.item_keys(), data.item_titles())
    probability_C = scorer.score(user=data.user_keys()[0], items=keys[:5], context={"scenario": "home"})
    assert probability_C.dtype == np.float32 and probability_C.shape == (5,)
    assert ((probability_C > 0) & (probability_C < 1)).all()
    assert scorer.version == json.loads((served.bundle / "manifest.json").read_text())["folder"]
    card = (served.bundle / scorer.version / "MODEL_CARD.md").read_text()
    assert "| AUC | 0." in card and "in_sample" in card and "2024-" in card and data.fingerprint in card


def test_candidates_do_not_move_each_other_and_requests_do_not_either(served):
    scorer = Scorer.open(served.bundle, store=served.store)
    keys, users = scorer.bundle.titles()[0], PreparedData.open(served.runs / "tiny-prepare").user_keys()
    requests = [ScoreRequest(users[i], keys[i : i + 1 + 7 * i], {}, 1.71e9) for i in range(5)]
    together = scorer.score_many(requests)
    for request, scored in zip(requests, together, strict=True):
        one_by_one = [scorer.score(request.user, [item], time=request.time)[0] for item in request.items]
        np.testing.assert_allclose(scored.scores, one_by_one, rtol=0, atol=1e-6)


def test_unknown_users_items_and_values_are_scored_and_counted(served):
    scorer = Scorer.open(served.bundle, store=served.store)
    keys, user = scorer.bundle.titles()[0], PreparedData.open(served.runs / "tiny-prepare").user_keys()[0]
    known, nobody = scorer.score_many(
        [ScoreRequest(user, [*keys[:2], "no such item"], {"scenario": "no such value"}), ScoreRequest("x", keys[:2])]
    )
    assert known.knowledge_present and known.knowledge_age_s >= 0 and not nobody.knowledge_present
    assert known.unknown_items == ["no such item"] and nobody.unknown_items == []
    assert known.unknown_values > nobody.unknown_values - 1 and nobody.unknown_user
    assert np.isnan(nobody.knowledge_age_s) and np.isfinite(nobody.scores).all() and np.isfinite(known.scores).all()
    assert scorer.score("x", ["unknown", "also unknown"]).tolist()[0] == scorer.score("x", ["also unknown"]).tolist()[0]
    with pytest.raises(UserError, match="no items"):
        scorer.score("x", [])
    with pytest.raises(UserError, match="scenari"):
        scorer.score("x", keys[:1], context={"scenari": "home"})


def test_without_a_store_and_with_one_that_is_gone_knowledge_is_absent_and_the_reason_is_given(served):
    keys, user = (
        Scorer.open(served.bundle).bundle.titles()[0],
        PreparedData.open(served.runs / "tiny-prepare").user_keys()[0],
    )
    without = Scorer.open(served.bundle).score_many([ScoreRequest(user, keys[:4], {}, 1.71e9)])[0]
    assert not without.knowledge_present and not without.store_error
    scorer = Scorer.open(served.bundle, store=served.store)
    there = scorer.score_many([ScoreRequest(user, keys[:4], {}, 1.71e9)])[0]
    assert there.knowledge_present and not np.allclose(there.scores, without.scores, atol=1e-6)

    def unreadable(_):
        raise OSError("the disk is gone")

    scorer.store.answers.get = unreadable
    gone = scorer.score_many([ScoreRequest(user, keys[:4], {}, 1.71e9)])[0]
    assert not gone.knowledge_present and "the disk is gone" in gone.store_error
    np.testing.assert_array_equal(gone.scores, without.scores)
    scorer.store = None
    assert scorer.store is None and not scorer.score_many([ScoreRequest(user, keys[:4])])[0].store_error


def changed_manifest(bundle, change):
    """The bundle with another manifest, whose own hash fits."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = own_hash(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_one_changed_bit_of_any_file_is_refused(served):
    folder = served.bundle / json.loads((served.bundle / "manifest.json").read_text())["folder"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"graph.pt2", "golden.parquet", "data.mdb", "MODEL_CARD.md", "0.npy"}
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(UserError, match=f"{file.name} was changed or damaged"):
            Scorer.open(served.bundle)
        file.write_bytes(content[:-1])
        with pytest.raises(UserError, match="was cut off or changed"):
            Scorer.open(served.bundle, verify=False)
        file.unlink()
        with pytest.raises(MissingFileError, match="lacks"):
            Scorer.open(served.bundle)
        file.write_bytes(content)
    Scorer.open(served.bundle)


def test_a_manifest_that_was_changed_or_names_other_files_is_refused(served):
    manifest = (served.bundle / "manifest.json").read_text()
    (served.bundle / "manifest.json").write_text(manifest.replace('"tolerance": 1e-06', '"tolerance": 1e-01'))
    with pytest.raises(UserError, match="has changed since it was published"):
        Scorer.open(served.bundle)
    for change, why in [
        (lambda m: m.update(folder="../tiny-query"), "it names the folder"),
        (lambda m: m["files"].update({"../../secret": {"sha256": "", "bytes": 1}}), "not a file in this folder"),
        (lambda m: m.update(num_items="many"), "it lacks num_items"),
        (lambda m: m.update(format=0), "has the format 0"),
        (lambda m: m.update(compile="aoti"), "machine code"),
        (lambda m: m["table_rows"].update(item_id=-1), "no number of rows"),
    ]:
        (served.bundle / "manifest.json").write_text(manifest)
        changed_manifest(served.bundle, change)
        with pytest.raises(UserError, match=why):
            Scorer.open(served.bundle)
    (served.bundle / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="expected abc"):
        Scorer.open(served.bundle, sha256="abc")
    Scorer.open(served.bundle, sha256=json.loads(manifest)["sha256"])
    with pytest.raises(MissingFileError, match="no bundle in"):
        Scorer.open(served.runs)
    with pytest.raises(UserError, match="no manifest of a bundle"):
        Scorer.open(served.store)


def test_a_table_that_fits_its_checksum_but_not_the_golden_rows_is_refused(served):
    folder = served.bundle / json.loads((served.bundle / "manifest.json").read_text())["folder"]
    table = np.load(folder / "tables/0.npy", mmap_mode="r+")
    table += 0.1
    table.flush()
    changed_manifest(served.bundle, lambda m: m["files"].update(listed(folder, [folder / "tables/0.npy"])))
    with pytest.raises(UserError, match="does not give the scores of its ranker: golden row"):
        Scorer.open(served.bundle)


def test_arrays_that_fit_their_checksums_and_lead_out_of_tables_are_refused(served):
    folder = served.bundle / json.loads((served.bundle / "manifest.json").read_text())["folder"]
    manifest = json.loads((served.bundle / "manifest.json").read_text())
    for name, change, why in [
        ("item_id.values", lambda x: x + 10**6, "leads out of its table"),
        ("item_id.values", lambda x: x[1:], "one entry for each"),
        ("item_id.values", lambda x: x.astype(object), "Python objects in dtype"),
        ("categories.offsets", lambda x: x[::-1], "one entry for each"),
        ("price", lambda x: x.astype(np.float64), "one number for each"),
        ("key_P", lambda x: x[::-1], "not sorted"),
        ("label_P1", lambda x: x[1:], "of another shape or type"),
    ]:
        (served.bundle / "manifest.json").write_text(json.dumps(manifest))
        file = folder / "items" / f"{name}.npy"
        before = file.read_bytes()
        np.save(file, change(np.load(file)), allow_pickle=True)
        changed_manifest(served.bundle, lambda m, file=file: m["files"].update(listed(folder, [file])))
        with pytest.raises(UserError, match=f"is damaged: .*{why}"):
            Scorer.open(served.bundle)
        file.write_bytes(before)
    for change, why in [(lambda m: m["spec"].pop("features"), "features"), (lambda m: m["spec"].update(x=1), "'x'")]:
        (served.bundle / "manifest.json").write_text(json.dumps(manifest))
        changed_manifest(served.bundle, change)
        with pytest.raises(UserError, match=f"is damaged: .*{why}"):
            Scorer.open(served.bundle)


def test_knowledge_of_another_lum_or_other_conditions_is_refused(served):
    other = [*WORDS, f"runs_dir={served.runs}"]
    STAGES["query"].run(load(None, [*other, "run=other-conditions", "query.conditions=[{}, {feedback: like}]"]))
    with pytest.raises(UserError, match="not what the ranker in .* was trained with: its conditions are"):
        Scorer.open(served.bundle, store=served.runs / "other-conditions")
    STAGES["pretrain"].run(load(None, [*other, "run=other-lum", "pretrain.train.max_steps=3"]))
    STAGES["query"].run(load(None, [*other, "run=of-other-lum", "inputs.lums=[other-lum]"]))
    with pytest.raises(UserError, match="its lums are"):
        Scorer.open(served.bundle, store=served.runs / "of-other-lum")
    shutil.move(served.store, served.runs / "moved")
    assert Scorer.open(served.bundle, store=served.runs / "moved").store is not None


def test_a_bundle_is_kept_made_again_and_read_on_while_the_next_one_is_published(served):
    config = load(None, served.words)
    scorer = Scorer.open(served.bundle, store=served.store)
    request = [ScoreRequest("x", scorer.bundle.titles()[0][:3], {}, 1.71e9)]
    before = scorer.score_many(request)[0].scores
    assert STAGES["export"].run(config)["version"] == scorer.version
    after = STAGES["export"].run(dataclasses.replace(config, overwrite=True))
    assert after["version"] != scorer.version and not (served.bundle / scorer.version).exists()
    np.testing.assert_array_equal(scorer.score_many(request)[0].scores, before)
    assert Scorer.open(served.bundle, sha256=after["sha256"]).version == after["version"]
    with pytest.raises(UserError, match="overwrite=true"):
        STAGES["export"].run(load(None, [*served.words, "export.dtype=int8"]))


def test_smaller_tables_score_nearly_the_same_and_say_how_nearly(served):
    result = STAGES["export"].run(load(None, [*served.words, "export.dtype=int8", "overwrite=true"]))
    scorer = Scorer.open(served.bundle, store=served.store)
    assert 1e-6 < result["golden_difference"] < 2e-2 == scorer.bundle.manifest["tolerance"]
    card = (served.bundle / scorer.version / "MODEL_CARD.md").read_text()
    assert "Tables: int8" in card and f"{result['golden_difference']:.2g}" in card


def test_states_of_other_data_are_refused_and_those_that_cannot_be_read_are_told(served):
    STAGES["user_state"].run(load(None, served.words))
    state = served.runs / "tiny-rank-user_state"
    user = PreparedData.open(served.runs / "tiny-prepare").user_keys()[0]
    scorer = Scorer.open(served.bundle, store=served.store, state=state)
    request = ScoreRequest(user, scorer.bundle.titles()[0][:4], {}, 1.71e9)
    there = scorer.score_many([request])[0]
    assert not there.unknown_user and not there.state_error

    def unreadable(_):
        raise OSError("the disk is gone")

    scorer.state.get = unreadable
    gone = scorer.score_many([request])[0]
    assert gone.unknown_user and "the disk is gone" in gone.state_error
    scorer.state = None
    np.testing.assert_array_equal(scorer.score_many([request])[0].scores, gone.scores)
    identity = json.loads((state / "state.json").read_text())
    for change, why in [
        ({"vocabulary_fingerprint": "other"}, "their vocabulary is 'other'"),
        ({"layout": {**identity["layout"], "items": []}}, "their layout is"),
        ({"layout": {**identity["layout"], "keep": 5}}, "5 events of a user are to be kept"),
    ]:
        (state / "state.json").write_text(json.dumps(identity | change))
        with pytest.raises(UserError, match=why):
            Scorer.open(served.bundle, state=state)
