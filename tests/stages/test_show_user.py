"""What the LUM knows of a user, as a person reads it: right titles, similarities and shares, and helpful errors."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lumrec.data.prepared import PreparedData
from lumrec.data.splits import user_fold
from lumrec.models.lum import ModelConfig, build_lum, load_lum
from lumrec.query.group_query import GroupQuery
from lumrec.stages import show_user
from lumrec.stages.registry import STAGES
from lumrec.stages.show_user import Event, Match, ShowUserConfig, UserView

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def query(experiment) -> GroupQuery:
    config = experiment()
    data = PreparedData.open(Path(config.runs_dir) / "tiny-prepare")
    dmp, builder, trained = load_lum(config.runs / "tiny-pretrain", data, device=torch.device("cpu"))
    return GroupQuery(dmp, builder, [{"feedback": "like"}, {}], max_events=trained.model.max_events)


def test_the_view_is_what_the_lum_says(query):
    data, user = query.data, 3
    view = show_user.look(query, user, num_top=data.num_items, num_events=4)
    start, end = data.user_offsets[user : user + 2]
    titles = data.item_titles()
    assert [event.title for event in view.events] == [titles[item] for item in data.item[end - 4 : end]]
    liked = {row: value for value, row in data.vocabulary("feedback").items()}
    assert [event.features["feedback"] for event in view.events] == [
        liked[row] for row in data.event_columns["feedback"].values[end - 4 : end].tolist()
    ]
    assert (view.user, view.num_events) == (data.user_keys()[user], end - start)
    seen = {titles[item] for item in data.item[start:end]}
    o_ND, e_ID = query.users(torch.tensor([user]))[0], query.items()
    for n, matches in enumerate(view.matches):
        expected = dict(zip(titles, (e_ID @ o_ND[n]).tolist()))
        assert [match.similarity for match in matches] == sorted((m.similarity for m in matches), reverse=True)
        assert all(match.similarity == pytest.approx(expected[match.title], abs=1e-5) for match in matches)
        assert sum(match.share for match in matches) == pytest.approx(1, abs=1e-4)
        assert {match.title for match in matches if match.seen} == seen


def test_seen_items_can_be_left_out(query):
    view = show_user.look(query, 3, num_top=10**6, leave_out_seen=True)
    start, end = query.data.user_offsets[3:5]
    unseen = query.data.num_items - len(set(query.data.item[start:end].tolist()))
    assert [len(matches) for matches in view.matches] == [unseen] * 2
    assert not any(match.seen for matches in view.matches for match in matches)


def test_the_app_prints_it(experiment, forks):
    config = experiment(
        "show_user.top=3", "show_user.events=2", "query.conditions=[{feedback: like}, {scenario: home}]"
    )
    user = PreparedData.open(Path(config.runs_dir) / "tiny-prepare").user_keys()[5]
    words = [f"runs_dir={config.runs_dir}", "show_user.top=3", "query.conditions=[{feedback: like}, {scenario: home}]"]
    options = ["--config", f"{config.runs_dir}/tiny-pretrain/config.yaml", "--user", user]
    said = forks.run_script(ROOT / "apps" / "show_user.py", *options, *words).text()
    assert f"user {user}: " in said
    assert "\nfeedback=like " in said and "\nscenario=home " in said
    assert said.count("\n   3. ") == 2


def test_the_lum_that_has_not_seen_the_user_answers(experiment, trained_runs, capsys):
    words = ["inputs.lums=[tiny-pretrain-0of2, tiny-pretrain-1of2]"]
    keys = PreparedData.open(Path(trained_runs) / "tiny-prepare").user_keys()
    fold_U, told = user_fold(keys, 2).tolist(), set()
    config = experiment(*words)
    for fold in (0, 1):
        user = keys[fold_U.index(fold)]
        STAGES["show_user"].run(dataclasses.replace(config, show_user=ShowUserConfig(user=user, top=3)))
        line = capsys.readouterr().out.splitlines()[0]
        assert line == f"tiny-pretrain-{fold}of2 says of"
        told.add(line)
    assert len(told) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no user is given; expected show_user.user="),
        (["show_user.user=nobody"], "holds no user 'nobody'; the nearest of its 60 are"),
        (
            ["show_user.page=user.pdf"],
            "show_user.page: got 'user.pdf', expected the name of a file that ends with .html",
        ),
        (["show_user.user=1", "show_user.top=0"], "show_user.top: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(experiment, words, message):
    with pytest.raises(ValueError, match=message):
        STAGES["show_user"].run(experiment(*words))


def test_a_lum_without_conditions_has_one_list(tiny_prepared):
    model, builder = build_lum(ModelConfig(dim=16, num_layers=1, max_events=8, conditions=[]), tiny_prepared)
    view = show_user.look(GroupQuery(model, builder, [{}], max_events=8), 0, num_top=3)
    assert view.conditions == [{}] and [len(matches) for matches in view.matches] == [3]
    assert "\n(no condition) " in show_user.text(view)


def test_the_page_shows_the_same_and_only_shows_it(tmp_path):
    evil = "<script>alert(1)</script>\u202e"
    view = UserView(
        "u<1>", 7, [Event("2001-01-02", evil, {"f": evil, "g": ""})], [{"f": evil}], [[Match(evil, 1.5, 0.25, True)]]
    )
    page = show_user.show_on_page(tmp_path / "user.html", evil, view).read_text()
    assert "u&lt;1&gt;" in page and "2001-01-02" in page and "1.500" in page and "25.00%" in page and ">seen<" in page
    assert "<script>" not in page and "\u202e" not in page and page.count("&lt;script&gt;alert(1)") == 5
