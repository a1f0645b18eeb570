"""Two runs compared by the scores that they keep."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumrec.metrics.bootstrap import Interval, intervals
from lumrec.metrics.compare import SCORES, Scores, better, compare_runs, main, read_scores, write_scores
from lumrec.run.errors import UserError


def make_run(folder, *, noise: float, rows: int = 2000, seed: int = 0):
    """A finished run whose logits are the truth and noise on it."""
    generator = np.random.default_rng(seed)
    user_N, truth_N = np.sort(generator.integers(100, size=rows)), generator.normal(size=rows)
    label_N = (generator.random(rows) < 1 / (1 + np.exp(-truth_N))).astype(np.int8)
    logit_N = truth_N + noise * generator.normal(size=rows)
    folder.mkdir()
    write_scores(folder, Scores(np.arange(rows) * 3, label_N, user_N, logit_N))
    (folder / "result.json").write_text("{}")
    return folder


def test_scores_are_read_back_as_they_were(tmp_path):
    folder = make_run(tmp_path / "a", noise=1.0)
    scores = read_scores(folder)
    assert [x.dtype for x in scores] == [np.int64, np.int8, np.int64, np.float64]
    write_scores(folder, scores)
    assert all(np.array_equal(x, y) for x, y in zip(read_scores(folder), scores))
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", SCORES]
    assert pq.read_table(folder / SCORES).column_names == ["row", "label", "user", "logit"]


def test_the_better_run_is_named(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", noise=1.0), make_run(tmp_path / "b", noise=0.1)
    scores, found = compare_runs(a, b, num_resamples=200)
    assert found["auc"].a == intervals(scores.label_N, scores.logit_N, scores.user_N, num_resamples=200)["auc"]
    main([str(a), str(b), "--resamples", "200"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2000 test rows of 100 users; 95% intervals over users, 200 resamples"
    assert [line.split()[0] for line in lines[4:]] == ["auc", "gauc", "log_loss"]
    assert all(line.endswith("b is better") for line in lines[4:])
    assert f"{found['auc'].difference.value:+.4f} [{found['auc'].difference.low:+.4f}" in lines[4]
    main([str(b), str(a), "--resamples", "200"])
    assert capsys.readouterr().out.count("a is better") == 3
    main([str(a), str(a), "--resamples", "200"])
    assert capsys.readouterr().out.count("no difference shown") == 3


@given(st.sampled_from(["auc", "gauc", "log_loss"]), st.floats(-1, 1), st.floats(0, 1))
def test_verdicts(metric, low, width):
    got = better(metric, Interval(low + width / 2, low, low + width))
    assert (got == 0) == (low <= 0 <= low + width)
    if got:
        assert (got == 1) == ((low > 0) != (metric == "log_loss"))


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    a, unfinished, old = make_run(tmp_path / "a", noise=1.0), make_run(tmp_path / "b", noise=1.0), tmp_path / "c"
    (unfinished / "result.json").unlink()
    old.mkdir()
    (old / "result.json").write_text("{}")
    for folder, message in (
        (unfinished, "is no finished run"),
        (old, "has no scores"),
        (tmp_path / "d", "no finish"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{folder} .*{message}.*overwrite=true"):
            compare_runs(a, folder)
    with pytest.raises(
        ValueError, match=r"\(2000 rows\).*\(50 rows\) were not tested on the same rows \(column row differs\)"
    ):
        compare_runs(a, make_run(tmp_path / "e", noise=1.0, rows=50))
    with pytest.raises(ValueError, match=r"not tested on the same rows \(column label differs\)"):
        compare_runs(a, make_run(tmp_path / "f", noise=1.0, seed=1))
    with pytest.raises(SystemExit) as stopped:
        main([str(a), str(old)])
    assert stopped.value.code == 2 and "lumrec: " in capsys.readouterr().err


def test_a_changed_bit_of_the_scores_is_noticed(tmp_path):
    write_scores(tmp_path, Scores(np.arange(500), np.zeros(500, np.int8), np.arange(500), np.linspace(0, 1, 500)))
    (tmp_path / "result.json").write_text("{}")
    file = tmp_path / SCORES
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    with pytest.raises(UserError, match="scores.parquet is damaged"):
        read_scores(tmp_path)
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="scores.parquet is damaged"):
        read_scores(tmp_path)
