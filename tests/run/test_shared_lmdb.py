"""LMDB's locks break where a process opens a file twice."""

import threading
from concurrent.futures import ThreadPoolExecutor

import lmdb

from lumrec.run.shared_lmdb import read_write


def test_threads_that_open_a_folder_at_the_same_moment_share_it(tmp_path, monkeypatch):
    opened, barrier = [], threading.Barrier(8)
    once = lmdb.open

    def counted(path, **options):
        opened.append(path)
        return once(path, **options)

    def share(folder):
        barrier.wait(120)
        return read_write(folder)

    monkeypatch.setattr(lmdb, "open", counted)
    folders = [tmp_path / str(number) for number in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for folder in folders:
            assert len(set(threads.map(share, [folder] * 8))) == 1
    assert sorted(opened) == sorted(map(str, folders))
