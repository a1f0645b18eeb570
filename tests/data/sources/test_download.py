"""Downloads against a server on this machine that cuts connections, changes its file, and knows Range or does not."""

import contextlib
import hashlib
import http.server
import io
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.sources import kuairand, movielens
from lumrec.data.sources.download import Archive, fetch_archive
from lumrec.data.sources.published import resolve
from lumrec.data.sources.raw_log import DataSetMissing

FILES = {"ratings.dat": os.urandom(40_000), "users.dat": b"1::F\n"}
NAMES = list(FILES)
BY_HAND = "Place the files by hand."


@dataclass
class Publisher:
    """What the server offers, how badly it behaves, and what it was asked."""

    url: str
    content: bytes = field(default=b"", repr=False)
    etag: str = '"first"'
    modified: str = ""
    ranges: bool = True
    heeds_if_range: bool = True
    wrong_start: int = 0  # a 206 begins so many bytes later than it was asked to
    cuts: list[int] = field(default_factory=list)  # bytes after which each of the next replies ends
    stall_after: int = -1  # bytes after which a reply waits for `go_on`
    go_on: threading.Event = field(default_factory=threading.Event)
    status: int = 200
    asked: list[str] = field(default_factory=list)  # the Range of each request, "" without one

    def offer(self, files: dict[str, bytes], *, kind: str = ".zip", folder: str = "ml-1m") -> Archive:
        """Serves an archive of `files` from now on."""
        self.content = zipped(files, folder) if kind == ".zip" else tarred(files, folder)
        checksum = "md5:" + hashlib.md5(self.content, usedforsecurity=False).hexdigest()
        return Archive(f"{self.url}/ml-1m{kind}", "https://a.publisher/page", checksum, folder, timeout_s=120.0)


def zipped(files: dict[str, bytes], folder: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], folder: str) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@contextlib.contextmanager
def serving() -> Iterator[Publisher]:
    publisher = Publisher("")

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            content, asked = publisher.content, self.headers.get("Range", "")
            publisher.asked.append(asked)
            version = publisher.etag or publisher.modified
            start, status = 0, publisher.status
            same = not publisher.heeds_if_range or self.headers.get("If-Range") in (None, version)
            if status == 200 and asked and publisher.ranges and same:
                start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + publisher.wrong_start, 206
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - start))
            for name, value in (("ETag", publisher.etag), ("Last-Modified", publisher.modified)):
                if value:
                    self.send_header(name, value)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            cut = publisher.cuts.pop(0) if publisher.cuts else len(content)
            if publisher.stall_after >= 0:
                self.wfile.write(content[start : start + publisher.stall_after])
                self.wfile.flush()
                publisher.go_on.wait(10)
                start, cut = start + publisher.stall_after, cut - publisher.stall_after
            self.wfile.write(content[start : start + cut])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        publisher.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield publisher
        running.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[Publisher]:
    with serving() as publisher:
        yield publisher


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A server of this test only: a request that another test's killed process has sent may be served late."""
    with serving() as publisher:
        yield publisher


def fetch(archive: Archive, target: Path, names: list[str] = NAMES) -> dict[str, bytes]:
    assert fetch_archive(archive, target, files=names, by_hand=BY_HAND) == target
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_an_archive_becomes_a_folder_and_nothing_else(
    publisher: Publisher, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture
):
    archive = publisher.offer({**FILES, "README": b"not asked for"}, kind=kind)
    assert fetch(archive, tmp_path / "new" / "ml-1m") == FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ml-1m"]
    assert (tmp_path / "new" / "ml-1m").stat().st_mode & 0o777 == 0o755
    assert capfd.readouterr().err == ""  # no progress bar where there is no terminal


def test_sha256_does_as_well(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    digest = hashlib.sha256(publisher.content).hexdigest()
    assert fetch(replace(archive, checksum=f"sha256:{digest}"), tmp_path / "ml-1m") == FILES


def test_a_terminal_gets_a_progress_bar(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    fetch(publisher.offer(FILES), tmp_path / "ml-1m")
    assert "ml-1m.zip: 100%" in sys.stderr.getvalue()


def test_a_cut_connection_is_continued_where_it_was_cut(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    publisher.cuts = [10_000, 5_000]
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == ["", "bytes=10000-", "bytes=15000-"]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 20_000), max_size=6), ranges=st.booleans(), dated=st.booleans())
def test_however_often_it_is_cut(
    server: Publisher, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], ranges: bool, dated: bool
):
    """With Range each byte comes once; without it each try must come further than the one before."""
    server.__dict__.update(Publisher(server.url).__dict__)
    folder = tmp_path_factory.mktemp("cuts")
    archive = server.offer(FILES)
    server.ranges, server.cuts = ranges, list(cuts) if ranges else sorted(set(cuts))
    if dated:
        server.etag, server.modified = "", "Sat, 01 Jan 2022 00:00:00 GMT"
    assert fetch(archive, folder / "ml-1m") == FILES
    if ranges:
        starts = [0 if not asked else int(asked[6:-1]) for asked in server.asked]
        assert starts == [min(sum(cuts[:n]), len(server.content)) for n in range(len(starts))]


def test_what_has_come_is_kept_for_the_next_try(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    publisher.cuts = [10_000, 0]  # the second connection brings nothing
    with pytest.raises(DataSetMissing, match="10,000 bytes are kept: the next try goes on") as error:
        fetch(archive, tmp_path / "ml-1m")
    assert archive.url in str(error.value) and str(error.value).endswith(BY_HAND)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ml-1m.zip.part", ".ml-1m.zip.part.state"]
    assert (tmp_path / ".ml-1m.zip.part").read_bytes() == publisher.content[:10_000]
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == ["", "bytes=10000-", "bytes=10000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m"]


def left_over(publisher: Publisher, archive: Archive, folder: Path, size: int) -> None:
    """Leaves the first `size` bytes of the archive behind, as a cut download does."""
    publisher.cuts = [size, 0]
    with pytest.raises(DataSetMissing):
        fetch(archive, folder / "ml-1m")
    publisher.asked.clear()


@pytest.mark.parametrize("name", ["etag", "modified"])
def test_a_changed_file_is_fetched_anew(publisher: Publisher, tmp_path: Path, name: str):
    if name == "modified":
        publisher.etag, publisher.modified = "", "Sat, 01 Jan 2022 00:00:00 GMT"
    left_over(publisher, publisher.offer(FILES), tmp_path, 10_000)
    changed = {**FILES, "ratings.dat": os.urandom(40_000)}
    archive = publisher.offer(changed)
    setattr(publisher, name, '"second"' if name == "etag" else "Sun, 02 Jan 2022 00:00:00 GMT")
    assert fetch(archive, tmp_path / "ml-1m") == changed
    assert publisher.asked == ["bytes=10000-"]  # answered with the whole file


def test_a_server_that_goes_on_with_another_file(publisher: Publisher, tmp_path: Path):
    """It knows Range and not If-Range, and names the other version in its reply."""
    left_over(publisher, publisher.offer(FILES), tmp_path, 10_000)
    changed = {**FILES, "ratings.dat": os.urandom(40_000)}
    archive = publisher.offer(changed)
    publisher.etag, publisher.heeds_if_range = '"second"', False
    assert fetch(archive, tmp_path / "ml-1m") == changed
    assert publisher.asked == ["bytes=10000-", ""]


def test_a_server_without_range_begins_again(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    publisher.ranges = False
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == ["bytes=10000-"]


def test_a_server_that_names_no_version_is_not_asked_to_go_on(publisher: Publisher, tmp_path: Path):
    publisher.etag = 'W/"weak"'
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == [""]


def test_a_reply_that_begins_elsewhere_is_not_taken(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    publisher.wrong_start = 7
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == ["bytes=10000-", ""]


def test_a_whole_download_is_not_fetched_again(publisher: Publisher, tmp_path: Path):
    """As where the process was killed before it unpacked."""
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    (tmp_path / ".ml-1m.zip.part").write_bytes(publisher.content)
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == [f"bytes={len(publisher.content)}-"]


def test_what_a_process_that_was_killed_while_it_unpacked_has_left_is_cleared(publisher: Publisher, tmp_path: Path):
    (tmp_path / ".ml-1m.unpacking").mkdir()
    (tmp_path / ".ml-1m.unpacking" / "ratings.dat").write_bytes(b"half")
    assert fetch(publisher.offer(FILES), tmp_path / "ml-1m") == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m"]


def test_a_partial_file_longer_than_the_archive_is_thrown_away(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    (tmp_path / ".ml-1m.zip.part").write_bytes(publisher.content + b"more")
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert len(publisher.asked) == 2


def test_a_partial_file_of_another_address_is_not_continued(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    left_over(publisher, archive, tmp_path, 10_000)
    assert fetch(replace(archive, url=f"{publisher.url}/other/ml-1m.zip"), tmp_path / "ml-1m") == FILES
    assert publisher.asked == [""]


def test_a_killed_process_is_continued(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    publisher.stall_after = 10_000
    program = (
        "import sys; from pathlib import Path; from lumrec.data.sources.download import Archive, fetch_archive\n"
        "url, checksum, target = sys.argv[1:]\n"
        "fetch_archive(Archive(url, '', checksum, 'ml-1m'), Path(target), files=['users.dat'], by_hand='')"
    )
    words = [sys.executable, "-c", program, archive.url, archive.checksum, str(tmp_path / "ml-1m")]
    part = tmp_path / ".ml-1m.zip.part"
    with subprocess.Popen(words) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == 10_000)
        process.send_signal(signal.SIGKILL)
    publisher.stall_after = -1
    publisher.go_on.set()
    assert part.exists() and not (tmp_path / "ml-1m").exists()
    assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert publisher.asked == ["", "bytes=10000-"]


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_fetch_it_once(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = publisher.offer(FILES)
    publisher.stall_after = 10_000
    found: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(archive, tmp_path / "ml-1m"))) for _ in range(3)]
    # Not capfd: emptied while threads write, it may lose what they say.
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    for thread in threads:
        thread.start()
    wait_for(lambda: bool(publisher.asked))
    wait_for(lambda: shown.getvalue().count("waiting for another process") == 2)
    publisher.go_on.set()
    for thread in threads:
        thread.join()
    assert found == [FILES] * 3
    assert publisher.asked == [""]
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m"]


@pytest.mark.parametrize("checksum", ["md5:0000", "sha256:0000"])
def test_another_checksum_is_not_kept(publisher: Publisher, tmp_path: Path, checksum: str):
    archive = replace(publisher.offer(FILES), checksum=checksum)
    with pytest.raises(ValueError, match="wrong checksum.*expected 0000; nothing was kept"):
        fetch(archive, tmp_path / "ml-1m")
    assert not list(tmp_path.iterdir())


def test_an_archive_without_checksum_says_what_came(
    publisher: Publisher, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    archive = replace(publisher.offer(FILES), checksum="")
    with caplog.at_level(logging.WARNING):
        assert fetch(archive, tmp_path / "ml-1m") == FILES
    assert "no published checksum" in caplog.text
    assert hashlib.sha256(publisher.content).hexdigest() in caplog.text


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_an_archive_without_the_files_is_not_kept(publisher: Publisher, tmp_path: Path, kind: str):
    archive = publisher.offer({"users.dat": b"1::F\n"}, kind=kind)
    with pytest.raises(ValueError, match="does not hold ratings.dat in ml-1m/; nothing was kept"):
        fetch(archive, tmp_path / "ml-1m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_a_broken_archive_is_not_kept(publisher: Publisher, tmp_path: Path, kind: str):
    archive = replace(publisher.offer(FILES, kind=kind), checksum="")
    publisher.content = publisher.content[: len(publisher.content) // 2]
    with pytest.raises(ValueError, match="cannot be unpacked.*nothing was kept"):
        fetch(archive, tmp_path / "ml-1m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_nothing_is_written_outside_of_the_folder(publisher: Publisher, tmp_path: Path, kind: str):
    evil = {"../../evil": b"x", "/../../../evil": b"x", "deeper/ratings.dat": b"not this one"}
    archive = publisher.offer({**evil, **FILES}, kind=kind)
    assert fetch(archive, tmp_path / "a" / "b" / "ml-1m") == FILES
    assert not [path for path in tmp_path.rglob("*") if path.name == "evil"]


def test_a_link_in_an_archive_is_not_followed(publisher: Publisher, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    archive = publisher.offer(FILES, kind=".tar.gz")
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as contents:
        for name, kind, to in (("users.dat", tarfile.SYMTYPE, str(secret)), ("ratings.dat", tarfile.LNKTYPE, "secret")):
            member = tarfile.TarInfo(f"ml-1m/{name}")
            member.type, member.linkname = kind, to
            contents.addfile(member)
    publisher.content = buffer.getvalue()
    with pytest.raises(ValueError, match="does not hold ratings.dat, users.dat"):
        fetch(replace(archive, checksum=""), tmp_path / "ml-1m")


def test_a_missing_page_is_asked_for_once(publisher: Publisher, tmp_path: Path):
    archive = publisher.offer(FILES)
    publisher.status = 404
    with pytest.raises(DataSetMissing, match=f"could not download {archive.url}: .*404(.|\n)*{BY_HAND}"):
        fetch(archive, tmp_path / "ml-1m")
    assert publisher.asked == [""]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/ml-1m.zip", "http://unknown.invalid/ml-1m.zip"])
def test_an_unreachable_publisher(tmp_path: Path, url: str):
    archive = Archive(url, "https://a.publisher/page", "md5:0000", "ml-1m", timeout_s=120.0)
    with pytest.raises(DataSetMissing, match=f"could not download {url}(.|\n)*{BY_HAND}"):
        fetch(archive, tmp_path / "cache" / "ml-1m")
    assert not list((tmp_path / "cache").iterdir())


def test_a_source_is_downloaded_to_the_cache_and_found_there(
    publisher: Publisher, nowhere: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    release = movielens.RELEASES["movielens-100k"]
    archive = publisher.offer({name: b"1|x\n" for name in [*release.files, "README"]}, folder="ml-100k")
    monkeypatch.setitem(movielens.RELEASES, "movielens-100k", replace(release, archive=archive))
    assert movielens.resolve(source="movielens-100k") == (nowhere / "ml-100k", "download")
    shown = capfd.readouterr()
    assert "MovieLens-100K is neither in LUMREC_DATA nor in" in shown.out and archive.url in shown.out
    assert shown.err == ""
    assert sorted(path.name for path in (nowhere / "ml-100k").iterdir()) == sorted(release.files)
    assert movielens.resolve(source="movielens-100k") == (nowhere / "ml-100k", "cache")
    assert publisher.asked == [""]


def test_a_tar_with_a_folder_in_a_folder(publisher: Publisher, nowhere: Path):
    place = kuairand._place(kuairand.RELEASES["kuairand-1k"], allow_part=False)
    files = {name: name.encode() for name in place.files}
    archive = publisher.offer(
        {**files, "log_random_4_22_to_5_08_1k.csv": b"x"}, kind=".tar.gz", folder="KuaiRand-1K/data"
    )
    assert resolve(replace(place, archive=archive)) == (nowhere / "kuairand-1k", "download")
    assert {path.name: path.read_bytes() for path in (nowhere / "kuairand-1k").iterdir()} == files
    assert resolve(place) == (nowhere / "kuairand-1k", "cache")
