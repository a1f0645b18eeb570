"""Files that a kill leaves whole, folders that change places, and a full disk in words."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from lumrec.experiments.config import load
from lumrec.knowledge.forget import read_keys_file
from lumrec.knowledge.parquet import import_parquet
from lumrec.run import files
from lumrec.run.changes import differing
from lumrec.run.errors import MissingFileError, UserError, did_you_mean
from lumrec.run.files import check_file, full_disk_told, leftovers, locked, read_json, remove_folder, replace_folder
from lumrec.train.plan import read_plan
from lumrec.warm_start.rules import read_rules
from lumrec.warm_start.scores import read_scores
from lumrec.warm_start.vocabulary import read_columns


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old" / "text").read_text() == "new"
    replace_folder(tmp_path / "old", tmp_path / "first")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_leftovers_are_those_of_one_folder_and_nothing_that_only_looks_like_them(tmp_path):
    for name in (".trash-a[1]-17", ".a[1].old-3", ".trash-b-17", ".trash-a[1]-mine", ".a.old-3", "a[1]"):
        (tmp_path / name).mkdir()
    assert {path.name for path in leftovers(tmp_path, "a[1]")} == {".trash-a[1]-17", ".a[1].old-3"}
    assert len(list(leftovers(tmp_path))) == 4
    remove_folder(tmp_path / "a[1]")
    assert len(list(tmp_path.iterdir())) == 5


def test_json_that_cannot_be_read_names_its_file(tmp_path):
    with pytest.raises(MissingFileError, match="x.json is missing; make it"):
        read_json(tmp_path / "x.json", again="make it")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="x.json is damaged or cut off"):
        read_json(tmp_path / "x.json", again="make it")


def test_a_full_disk_is_told_however_a_library_says_it(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (full, RuntimeError(f"write failed: {full}"), CheckpointException("save", {0: (full, None)})):
        with pytest.raises(UserError, match=f"no space left for it in {tmp_path} .*: make room"):
            with full_disk_told(tmp_path, "it", then="make room"):
                raise error
    with pytest.raises(UserError, match="no space left"):
        with full_disk_told(tmp_path, "it", then="make room"):
            try:
                raise full
            except OSError as error:
                raise UserError("the log is damaged") from error
    for bug in (ValueError("x"), OSError(errno.ENOENT, "x"), KeyboardInterrupt()):
        with pytest.raises(type(bug)) as raised:
            with full_disk_told(tmp_path, "it", then="make room"):
                raise bug
        assert raised.value is bug


def test_a_library_that_does_not_say_why_it_failed_on_a_full_disk(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        with pytest.raises(UserError, match="no space left for it"):
            with full_disk_told(tmp_path, "it", then="make room"):
                raise RuntimeError("unexpected pos 64 vs 0")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("folder", [False, True])
def test_a_lock_is_held_by_one_and_goes_with_its_holder(tmp_path, folder):
    path = tmp_path / "x"
    with locked(path, folder=folder):
        with pytest.raises(BlockingIOError), locked(path, folder=folder):
            pass
        child = os.fork()
        if child == 0:  # it ends with the lock's descriptor open
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(BlockingIOError), locked(path, folder=folder):
            pass
    with locked(path, folder=folder):
        assert path.is_dir() == folder


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path / "x"):
        assert "no locks on this file system" in caplog.text


def test_what_differs_is_named_by_its_dotted_key():
    stored, now = {"a": {"b": 1, "c": {}}, "d": [1]}, {"a": {"b": 2}, "d": [1], "e": "x"}
    assert list(differing(stored, now)) == [("a.b", 1, 2), ("e", "(absent)", "x")]


def test_the_nearest_name_is_found_whatever_its_case():
    assert did_you_mean("LABEL ", ["Label", "item"]) == " (did you mean 'Label'?)"
    assert did_you_mean("zzz", ["Label", "item"]) == ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "key: .*/x is a folder; expected some text"),
        (
            lambda path: path.symlink_to(path.parent / "gone"),
            "there is no .*/x .it is a link to .*gone.; expected some",
        ),
        (
            lambda path: path.symlink_to(path),
            "/x cannot be read .Too many levels of symbolic links.; expected some text",
        ),
        (lambda path: os.mkfifo(path), "/x is no file but a socket, pipe or device"),
        (
            lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
            "is no file but a socket, pipe or dev",
        ),
        (lambda path: None, "key: there is no .*/x; expected some text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=said):
        check_file(tmp_path / "x", "key", "some text")


def test_what_may_be_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for path in (tmp_path / "x", str(tmp_path / "link")):
        assert check_file(path, "", "") == Path(path)
    assert check_file(tmp_path, "", "", may_be_folder=True) == tmp_path
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(UserError, match="cannot be read"):
            check_file(path, "", "some text", may_be_folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(UserError, match="/x cannot be read .Permission denied.; expected some text"):
        check_file(tmp_path / "x", "", "some text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="there is no gone; expected some text .from /"):
        check_file("gone", "", "some text")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (load, "my.yaml"),
        (lambda path: read_plan(str(path), world_size=1), "plan.yaml"),
        (read_rules, "rules.yaml"),
        (read_scores, "said.csv"),
        (read_keys_file, "keys.txt"),
        (lambda path: read_columns(path, ["key"]), "item.parquet"),
        (lambda path: import_parquet(path.parent, path.parent / "store"), "users.parquet"),
    ],
    ids=["config", "plan", "rules", "scores", "keys", "vocabulary", "import"],
)
def test_a_folder_in_place_of_an_input_file(tmp_path, read, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is a folder; expected"):
        read(tmp_path / name)
