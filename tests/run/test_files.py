"""Files that a kill leaves whole, folders that change places, and a full disk in words."""

import errno
import os
import subprocess

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from lumrec.run import files
from lumrec.run.changes import differing
from lumrec.run.errors import MissingFileError, UserError, did_you_mean
from lumrec.run.files import full_disk_told, leftovers, locked, read_json, remove_folder, replace_folder


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
