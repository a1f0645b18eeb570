"""The query stage: what it publishes is what the LUM says, whatever the ranks, kills and versions on the way."""

import json
import shutil
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Run
from sklearn.metrics import roc_auc_score

from lumrec.batches.rows import training_rows
from lumrec.batches.windows import training_windows
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import LATER, TEST, TRAIN, leave_out_later, user_fold
from lumrec.experiments.config import load
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.models.lum import load_lum
from lumrec.query.group_query import GroupQuery
from lumrec.run.typed_yaml import to_yaml
from lumrec.stages.registry import STAGES

ROOT = Path(__file__).resolve().parents[2]
FOLDS = "inputs.lums=[tiny-pretrain-0of2, tiny-pretrain-1of2]"
CONDITIONS = "query.conditions=[{feedback: like}, {feedback: dislike, scenario: search}, {}]"


def opened(config) -> tuple[PreparedData, Path]:
    runs = Path(config.runs_dir)
    return PreparedData.open(runs / "tiny-prepare"), runs / "tiny-query"


def asked_directly(config, run: str, data: PreparedData, conditions) -> GroupQuery:
    dmp, builder, trained = load_lum(config.runs / run, data, device=torch.device("cpu"))
    return GroupQuery(dmp, builder, conditions, max_events=trained.model.max_events)


@pytest.fixture
def in_subprocess(forks):
    """Runs code with a config loaded, in a process of its own or, as under torchrun, in so many ranks."""
    return lambda *code_config_words, ranks=1: in_forks(forks, *code_config_words, ranks=ranks)


def in_forks(forks, code: str, config, *words: str, ranks: int) -> Run:
    folder = Path(config.runs_dir).parent
    text = "import sys\nfrom lumrec.experiments.config import load\nfrom lumrec.knowledge import writer\n"
    text += "from lumrec.stages.registry import STAGES\n"
    (folder / "script.yaml").write_text(to_yaml(config))
    text += f"config = load({str(folder / 'script.yaml')!r}, sys.argv[1:])\n"
    (folder / "script.py").write_text(text + textwrap.dedent(code))
    return forks.start_script(folder / "script.py", f"runs_dir={config.runs_dir}", *words, world_size=ranks)


def test_what_is_published_is_what_the_lum_says(experiment):
    config = experiment(CONDITIONS)
    result = STAGES["query"].run(config)
    data, path = opened(config)
    knowledge, store = Knowledge.open(path, data), KnowledgeStore.open(path)
    query = asked_directly(config, "tiny-pretrain", data, knowledge.conditions)
    everyone = torch.from_numpy(np.flatnonzero(np.diff(data.user_offsets) > 0))

    row_R, o_RND = query.rows(everyone)
    got = knowledge.for_rows(row_R)
    torch.testing.assert_close(got.o_BND, o_RND, atol=3e-3, rtol=0)
    assert got.present_BN.shape == (len(row_R), 3) and bool(got.present_BN.all()) and not got.fold_B.any()
    torch.testing.assert_close(knowledge.items_e[0], query.items(), atol=3e-3, rtol=0)
    similarity = got.o_BND.double() @ knowledge.items_e[0].double().T
    torch.testing.assert_close(got.log_z_BN.double(), similarity.logsumexp(-1), atol=1e-4, rtol=1e-5)

    # What the answers rank by themselves: like against the mean of the two other answers, over the rows that have one.
    score_R = got.o_BND @ knowledge.items_e[0].float().T
    score_R = score_R[torch.arange(len(row_R)), :, data.item[row_R]]
    score_R = score_R[:, 0] - score_R[:, 1:].mean(1)
    in_test = torch.from_numpy(data.split == TEST)[row_R]
    expected = roc_auc_score(data.label[row_R[in_test]], score_R[in_test])
    assert result["test/lum_auc"] == pytest.approx(expected, abs=1e-6)

    keys = data.user_keys()
    served = store.get([keys[user] for user in everyone.tolist()])
    torch.testing.assert_close(served.o_BND, query.users(everyone), atol=3e-3, rtol=0)
    similarity = served.o_BND.double() @ knowledge.items_e[0].double().T
    torch.testing.assert_close(served.log_z_BN.double(), similarity.logsumexp(-1), atol=1e-4, rtol=1e-5)
    assert bool((served.age_s_B >= 0).all()) and bool((served.age_s_B < 600).all())

    assert result["hazard"] == "in_sample" and result["conditions"] == 3 and result["dim"] == 16
    assert result["rows"] == int(knowledge.present.sum()) == data.num_events - len(everyone)
    assert result["users"] == len(store) == len(everyone)
    assert result["rows"] + result["rows_absent"] == data.num_events
    assert result["bytes"] == sum(file.stat().st_size for file in knowledge.path.rglob("*") if file.is_file())
    assert json.loads((path / "result.json").read_text()) == result
    assert knowledge.manifest["window"] == {"max_events": 16, "stride": 8}
    assert knowledge.manifest["similarity"] == "cosine" and knowledge.manifest["temperature"] == 0.05


def test_a_first_event_and_an_unknown_user_are_absent(experiment):
    config = experiment()
    STAGES["query"].run(config)
    data, path = opened(config)
    firsts = Knowledge.open(path, data).for_rows(data.user_offsets[:-1])
    assert not firsts.present_BN.any() and not firsts.o_BND.any()
    store = KnowledgeStore.open(path)
    known = data.user_keys()[0]
    served = store.get(["nobody", known, "", "x" * 2000])
    assert served.present_BN[:, 0].tolist() == [False, True, False, False]
    assert (
        not served.o_BND[0].any() and bool(torch.isnan(served.age_s_B[0])) and served.fold_B.tolist() == [-1, 0, -1, -1]
    )


def test_a_finished_run_stands_and_a_new_lum_makes_a_new_version(experiment):
    config = experiment("query.users=false")
    result = STAGES["query"].run(config)
    data, path = opened(config)
    before = Knowledge.open(path, data)
    assert STAGES["query"].run(config) == result and Knowledge.open(path, data).path == before.path

    STAGES["pretrain"].run(
        experiment("seed=1", "data.simulator.num_users=60", "overwrite=true", "inputs.prepared=tiny-prepare")
    )
    STAGES["query"].run(config)
    after = Knowledge.open(path, data)
    assert after.path != before.path and not before.path.exists()
    assert not torch.equal(after.items_e, before.items_e)
    assert np.isfinite(before.for_rows(np.arange(data.num_events)).o_BND).all()  # who has opened the old one reads on
    with pytest.raises(ValueError, match="query.users=true"):
        KnowledgeStore.open(path)


def test_knowledge_split_in_time_leaves_the_later_rows_to_the_ranker(experiment):
    STAGES["pretrain"].run(experiment("run=early", "pretrain.time_share=0.5", "inputs.prepared=tiny-prepare"))
    config = experiment("inputs.lums=[early]", "query.users=false")
    assert STAGES["query"].run(config)["hazard"] == "time_split"
    data, path = opened(config)
    knowledge = Knowledge.open(path, data)
    learnt = leave_out_later(data.split, data.timestamp, 0.5)
    rows = training_rows(data, knowledge)
    assert np.array_equal(rows, np.flatnonzero(learnt == LATER)) and 0 < len(rows) < (data.split == TRAIN).sum()
    assert data.timestamp[learnt == TRAIN].max() == knowledge.learnt_until < data.timestamp[rows].min()
    assert np.array_equal(training_rows(data, None), np.flatnonzero(data.split == TRAIN))

    data.split = learnt  # what the LUM was trained on
    everyone = np.ones(data.num_users, bool)
    windows = training_windows(data, max_events=8, users=everyone, generator=torch.Generator().manual_seed(0))
    read = np.concatenate([np.arange(a, a + n) for a, n in zip(windows.start_W.tolist(), windows.length_W.tolist())])
    assert sorted(read) == np.flatnonzero(learnt == TRAIN).tolist()


def test_cross_fitting_asks_each_user_of_the_lum_that_never_saw_them(experiment):
    config = experiment("inputs.lums=[tiny-pretrain-1of2, tiny-pretrain-0of2]")  # whatever the order
    result = STAGES["query"].run(config)
    assert result["hazard"] == "cross_fit" and result["lums"] == 2
    data, path = opened(config)
    knowledge = Knowledge.open(path, data)
    fold_U = user_fold(data.user_keys(), 2)
    assert np.array_equal(knowledge.user_fold, fold_U) and 0 < fold_U.mean() < 1
    for fold in (0, 1):
        query = asked_directly(config, f"tiny-pretrain-{fold}of2", data, knowledge.conditions)
        users = torch.from_numpy(np.flatnonzero((fold_U == fold) & (np.diff(data.user_offsets) > 0)))
        row_R, o_RND = query.rows(users)
        got = knowledge.for_rows(row_R)
        torch.testing.assert_close(got.o_BND, o_RND, atol=3e-3, rtol=0)
        assert got.fold_B.tolist() == [fold] * len(row_R)
        torch.testing.assert_close(knowledge.items_e[fold], query.items(), atol=3e-3, rtol=0)
        served = KnowledgeStore.open(path).get([data.user_keys()[user] for user in users.tolist()])
        torch.testing.assert_close(served.o_BND, query.users(users), atol=3e-3, rtol=0)
        assert served.fold_B.tolist() == [fold] * len(users)
    assert set(fold_U[data.user[data.split == 2]]) == {0, 1}  # test rows are shared out as well


def test_switched_off_parts_are_not_there(experiment):
    config = experiment("query.rows=false", "query.log_normalizer=false", "query.dtype=float32")
    result = STAGES["query"].run(config)
    data, path = opened(config)
    assert "rows" not in result
    knowledge = Knowledge.open(path, data)
    assert sorted(file.name for file in knowledge.path.iterdir()) == [
        "items.parquet",
        "items_e.npy",
        "store",
        "user_fold.npy",
        "users.npy",
    ]
    with pytest.raises(ValueError, match="query.rows=true"):
        knowledge.for_rows(np.array([0]))
    served = KnowledgeStore.open(path).get([data.user_keys()[0]])
    assert served.log_z_BN is None
    direct = asked_directly(config, "tiny-pretrain", data, knowledge.conditions).users(torch.tensor([0]))
    torch.testing.assert_close(served.o_BND, direct, atol=2e-5, rtol=0)


def test_a_killed_build_goes_on_and_the_old_version_can_be_read_meanwhile(experiment, in_subprocess):
    words = [FOLDS, CONDITIONS]
    config = experiment(*words)
    STAGES["query"].run(config)
    data, path = opened(config)
    old = Knowledge.open(path, data)
    everything = np.arange(data.num_events)
    answers = old.for_rows(everything)

    other = experiment("seed=1", "fold=0/2", "overwrite=true", "inputs.prepared=tiny-prepare")
    STAGES["pretrain"].run(other)
    killed = in_subprocess(
        """
        import os, signal
        commit = writer.KnowledgeWriter.commit
        def die_or_commit(self, unit):
            if unit == "users/0/1":  # written, but not yet marked as finished
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self, unit)
        writer.KnowledgeWriter.commit = die_or_commit
        STAGES["query"].run(config)
        """,
        config,
        *words,
    )
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    assert (path / "building" / "progress-0").exists()
    assert torch.equal(Knowledge.open(path, data).for_rows(everything).o_BND, answers.o_BND)
    assert bool(KnowledgeStore.open(path).get([data.user_keys()[0]]).present_BN.all())

    finished = (path / "building" / "progress-0").read_text().splitlines()
    resumed = in_subprocess(
        """
        commit = writer.KnowledgeWriter.commit
        def tell_and_commit(self, unit):
            print("unit", unit)
            commit(self, unit)
        writer.KnowledgeWriter.commit = tell_and_commit
        STAGES["query"].run(config)
        """,
        config,
        *words,
    )
    assert resumed.wait() == [0], resumed.text()
    rest = [line.removeprefix("unit ") for line in resumed.text().splitlines() if line.startswith("unit ")]
    assert finished and "users/0/1" in rest and "rows/1/0" in rest
    assert set(finished) & set(rest) == {"items/0"}  # items are cheap: encoded anew, to be summed over
    new = Knowledge.open(path, data)
    assert new.path != old.path and not (path / "building").exists()

    fresh = experiment(*words, "run=uninterrupted")
    result = STAGES["query"].run(fresh)
    whole = Knowledge.open(path.with_name("uninterrupted"), data)
    for name in ("rows_o.npy", "rows_log_z.npy", "rows_present.npy", "items_e.npy", "user_fold.npy"):
        assert (new.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    mine, theirs = KnowledgeStore.open(path), KnowledgeStore.open(path.with_name("uninterrupted"))
    assert torch.equal(mine.get(data.user_keys()).o_BND, theirs.get(data.user_keys()).o_BND)
    assert len(mine) == len(theirs) == result["users"]


def test_two_ranks_write_what_one_writes(experiment, in_subprocess):
    words = [FOLDS, CONDITIONS]
    config = experiment(*words)
    both = in_subprocess('STAGES["query"].run(config)', config, *words, "run=two-ranks", ranks=2)
    assert both.wait() == [0, 0], both.text()
    STAGES["query"].run(config)
    data, path = opened(config)
    one, two = Knowledge.open(path, data), Knowledge.open(path.with_name("two-ranks"), data)
    everything = np.arange(data.num_events)
    assert torch.equal(one.for_rows(everything).present_BN, two.for_rows(everything).present_BN)
    torch.testing.assert_close(one.for_rows(everything).o_BND, two.for_rows(everything).o_BND, atol=5e-3, rtol=0)
    torch.testing.assert_close(one.for_rows(everything).log_z_BN, two.for_rows(everything).log_z_BN, atol=5e-3, rtol=0)
    torch.testing.assert_close(one.items_e, two.items_e, atol=5e-3, rtol=0)
    keys = [*data.user_keys(), "nobody"]
    alone, shared = KnowledgeStore.open(path).get(keys), KnowledgeStore.open(path.with_name("two-ranks")).get(keys)
    torch.testing.assert_close(alone.o_BND, shared.o_BND, atol=5e-3, rtol=0)
    assert torch.equal(alone.present_BN, shared.present_BN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inputs.lums=[tiny-pretrain, tiny-pretrain-1of2]"], r"fold=0/2, fold=1/2.*tiny-pretrain has fold=\(none\)"),
        (
            ["inputs.lums=[tiny-pretrain-0of2, tiny-pretrain-0of2]"],
            "tiny-pretrain-0of2 has fold=0/2, tiny-pretrain-0of2",
        ),
        (["inputs.lums=[tiny-pretrain-0of2]"], "One LUM alone must be one without a fold"),
        (["query.dtype=float61"], "expected one of"),
        (["query.rows=false", "query.users=false"], "nothing to ask about"),
        (["query.conditions=[{feedback: liek}]"], "did you mean 'like'"),
        (["query.stride=16"], "expected less than the LUM.s model.max_events=16"),
        (["query.tokens_per_pack=0"], "query.tokens_per_pack: got 0, expected at least 1"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(experiment, words, message):
    with pytest.raises(ValueError, match=message):
        STAGES["query"].run(experiment(*words))


def test_missing_inputs_name_the_command_that_makes_them(experiment):
    with pytest.raises(FileNotFoundError, match=r"apps/pretrain.py .* run=tiny-pretrain-3of4 fold=3/4"):
        STAGES["query"].run(experiment("inputs.lums=[tiny-pretrain-3of4]"))
    config = experiment()
    shutil.rmtree(Path(config.runs_dir) / "tiny-prepare")
    with pytest.raises(FileNotFoundError, match="apps/prepare.py"):
        STAGES["query"].run(config)


def test_a_lum_of_other_data_is_refused(experiment, tmp_path):

    STAGES["prepare"].run(experiment("run=other", "seed=5"))
    with pytest.raises(ValueError, match="trained on other data"):
        STAGES["query"].run(experiment("inputs.prepared=other"))


def test_answers_too_large_for_the_dtype_are_refused(experiment):
    STAGES["pretrain"].run(experiment("run=hot", "model.temperature=1e-12"))
    with pytest.raises(ValueError, match="query.dtype=float32"):
        STAGES["query"].run(experiment("inputs.lums=[hot]"))


PAGES_WORDS = [
    "name=pages",
    "data.source=log",
    "data.log.time_unit=s",
    "data.split={kind: time, times: ['1970-01-05', '1970-01-06']}",
    "schema.features={item_id: {role: item}, feedback: {role: condition, wish: true}, scene: {role: condition}}",
    "model.dim=16",
    "model.max_events=16",
    "model.similarity=dot",
    "pretrain.packing.events_per_pack=256",
    "pretrain.train.max_steps=4",
    "rank.knowledge=both",
    "rank.max_history=9",
]


def page_log(path: Path, changed: dict[int, int] | None = None) -> None:
    """Seven days, a page of three items a day for each of 12 users, all at one second.

    changed: day → how far user 3's items are moved that day, with the label and the scene turned over.
    """
    lines = ["user_id,item_id,timestamp,label,scene"]
    for day in range(7):
        for user in range(12):
            for place in range(3):
                move = (changed or {}).get(day, 0) if user == 3 else 0
                item, label = (5 * user + 3 * day + place + move) % 20, (user + day + place + bool(move)) % 2
                lines.append(f"u{user},i{item},{86_400 * day + user},{label},s{(place + move) % 2}")
    path.write_text("\n".join(lines))


def test_the_stores_answers_are_of_what_was_strictly_earlier(tmp_path):
    """From the log to what a ranker reads: rows of the same second and later ones change nothing, earlier ones do."""

    def answers(name: str, changed: dict[int, int]) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        page_log(log := tmp_path / f"{name}.csv", changed)
        words = [*PAGES_WORDS, f"runs_dir={tmp_path}", f"data.log.events={log}", f"inputs.prepared={name}"]
        STAGES["prepare"].run(load(None, [*words, f"run={name}"]))
        if name == "pages":
            STAGES["pretrain"].run(load(None, words))
        STAGES["query"].run(load(None, [*words, f"run={name}-query"]))
        data = PreparedData.open(tmp_path / name)
        rows = np.flatnonzero(data.user == data.user_keys().index("u3"))
        known = Knowledge.open(tmp_path / f"{name}-query", data).for_rows(rows)
        return data.timestamp[rows] // 86_400, known.o_BND, known.present_BN

    day_B, o_BND, present_BN = answers("pages", {})
    assert day_B.tolist() == sorted(3 * list(range(7))) and present_BN[3:].all()
    for name, changed, same in (("later", {5: 7, 6: 4}, day_B <= 5), ("earlier", {4: 7}, day_B <= 4)):
        _, other_BND, _ = answers(name, changed)
        assert torch.equal(other_BND[same], o_BND[same])
        assert not torch.isclose(other_BND[~same], o_BND[~same]).all(dim=2).any()
