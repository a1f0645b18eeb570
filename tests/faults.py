"""Stops real commands at each of their durable operations, runs them again, and looks at what is there.

    python tests/faults.py                     every point of every command; prints how many there are
    python tests/faults.py publish forget      of these commands
    python tests/faults.py forget=5 prepare=2  five points of one and two of the other, spread over their runs

A point is the moment before a rename, unlink, rmdir, mkdir, fsync, opening of a file for writing, or write of a Parquet
file, a NumPy column or LMDB records; and, in the middle of a write of Python's, when half of it is on disk. The process
stops there as by SIGKILL: no finally, no atexit. What is required of each command, at each point:

    readable   what was published before the command can be read at this moment, and is the old or the new one
    same       the command, run again, ends with the result of one that was never stopped
    clean      nothing is left that one that was never stopped does not leave

The commands run in forks of this process, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers"), str(Path(__file__).parent)]
os.environ.update({"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"})

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from shop_log import SHOP_USERS, shop_log  # noqa: E402
from small_experiments import LOG_WORDS  # noqa: E402
from small_store import KEYS, publish  # noqa: E402

from lumrec.data.prepared import PreparedData  # noqa: E402
from lumrec.experiments.config import load  # noqa: E402
from lumrec.knowledge.forget import forget  # noqa: E402
from lumrec.knowledge.parquet import export_parquet, import_parquet  # noqa: E402
from lumrec.knowledge.store import Knowledge, KnowledgeStore  # noqa: E402
from lumrec.knowledge.writer import KnowledgeWriter  # noqa: E402
from lumrec.stages import query as stage  # noqa: E402
from lumrec.stages.registry import STAGES  # noqa: E402
from lumrec.train.checkpoint import best_checkpoint, read_meta  # noqa: E402

STOPPED = 77
AUDITED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
NATIVE = [
    (pq, "write_table"),
    (pq.ParquetWriter, "write_table"),
    (pl.DataFrame, "write_parquet"),
    (pl.LazyFrame, "sink_parquet"),
    (np.memmap, "flush"),
    (KnowledgeWriter, "write_users"),
    (KnowledgeWriter, "_compact_lmdb"),
]


class Stopper:
    """Counts the operations of this process on files under `folder` and stops it at number `at` (from 1)."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.count, self.names = str(folder), at, 0, []
        sys.addaudithook(self._audit)
        self.open, self.fsync = builtins.open, os.fsync
        builtins.open = io.open = self._open
        os.fsync = self._fsync
        for owner, name in NATIVE:
            setattr(owner, name, self._before(getattr(owner, name), name))

    def point(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.at:
            os._exit(STOPPED)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in AUDITED and self.folder in os.path.abspath(os.fsdecode(arguments[0])):
            self.point(f"{event} {Path(os.fsdecode(arguments[0])).name}")

    def _fsync(self, descriptor: Any) -> None:
        self.point("fsync")
        self.fsync(descriptor)

    def _before(self, function: Callable, name: str) -> Callable:
        def stopping(*args: Any, **kwargs: Any) -> Any:
            self.point(name)
            return function(*args, **kwargs)

        return stopping

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+")
        if not writes or self.folder not in os.path.abspath(os.fspath(file)):
            return self.open(file, mode, *args, **kwargs)
        self.point(f"open {Path(file).name}")
        opened = self.open(file, mode, *args, **kwargs)
        return opened if "+" in mode else HalfWriting(opened, self)


class HalfWriting:
    """A file whose write is a point: the process stops when half of it is on disk."""

    def __init__(self, file: Any, stopper: Stopper) -> None:
        self.file, self.stopper, self.writes = file, stopper, 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes & (self.writes - 1):  # of thousands of small writes to one file, those number 1, 2, 4, 8, …
            return self.file.write(data)
        if self.stopper.count + 1 == self.stopper.at:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
        self.stopper.point("write")
        return self.file.write(data)

    def __enter__(self) -> HalfWriting:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Command(NamedTuple):
    """before: makes the folder that the command starts from. run: the command itself. read: what readers see; it
    raises where they see nothing. result: what has to be the same in the end."""

    before: Callable[[Path], Any]
    run: Callable[[Path], Any]
    read: Callable[[Path], Any]
    result: Callable[[Path], Any]


def in_fork(work: Callable[[], Any]) -> int:
    """Exit code of a fork of this process that does `work`."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_fork_giving(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` gives in a fork; raises AssertionError where it fails."""
    file = folder / "given.pt"
    assert in_fork(lambda: torch.save(work(), file)) == 0, "failed in a fork, see above"
    return torch.load(file, weights_only=False)


def walk(name: str, num_points: int = 0) -> int:
    """Stops the command `name` at `num_points` points spread over its run, 0 = all; how many it has. Raises
    AssertionError for the first that is not as the top of this file says."""
    command = COMMANDS[name]
    with tempfile.TemporaryDirectory(prefix="lumrec-faults-") as temporary:
        base, whole = Path(temporary) / "base", Path(temporary) / "whole"
        base.mkdir()
        assert in_fork(lambda: command.before(base)) == 0
        old = in_fork_giving(lambda: command.read(base), Path(temporary))

        def counted() -> list[str]:
            stopper = Stopper(base, 0)
            command.run(base)
            return stopper.names

        shutil.copytree(base, whole, symlinks=True)
        names = in_fork_giving(counted, Path(temporary))
        expected, new, files = in_fork_giving(
            lambda: (command.result(base), command.read(base), listing(base)), Path(temporary)
        )
        count = len(names)
        chosen = range(1, count + 1)
        if 0 < num_points < count:
            chosen = sorted({round((i + 0.5) * count / num_points) for i in range(num_points)})  # type: ignore[assignment]
        for at in chosen:
            shutil.rmtree(base)
            shutil.copytree(whole, base, symlinks=True)  # the same place, as some files hold it

            def stopped(at: int = at) -> None:
                Stopper(base, at)
                command.run(base)

            where = f"{name}, point {at} of {count} ({names[at - 1]})"
            code = in_fork(stopped)
            assert code == STOPPED, f"{where}: was not reached ({code})"
            seen = in_fork_giving(lambda: command.read(base), Path(temporary))
            assert repr(seen) in (repr(old), repr(new)), f"{where}: readers saw neither what was there nor what comes"
            assert in_fork(lambda: command.run(base)) == 0, f"{where}: the same command failed afterwards"
            got = in_fork_giving(lambda: (command.result(base), command.read(base), listing(base)), Path(temporary))
            assert repr(got[:2]) == repr((expected, new)), f"{where}: another result"  # by text, as nan is not nan
            assert set(got[2]) <= set(files), f"{where}: left {set(got[2]) - set(files)}"
        return count


def listing(folder: Path) -> list[str]:
    """Every file, with the ids of versions and of TensorBoard's files left out."""
    names = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if "tensorboard" not in parts:
            names.append("/".join(part.rsplit("-", 1)[0] if part.startswith("knowledge-") else part for part in parts))
    return sorted(names)


# What readers of a store see: an answer of one user, or that there is none, and the items.
def read_store(path: Path, keys: list[str]) -> Any:
    store = KnowledgeStore.open(path)
    return store.get(keys).o_BND.tolist(), store.get(keys).present_BN.tolist(), store.items()[1].tolist()


def holding(folder: Path, key: str) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


SHOP = [
    *LOG_WORDS,
    "model.num_layers=1",
    "pretrain.train.max_steps=2",
    "pretrain.train.checkpoint_every=1",
]


def shop(base: Path, *words: str) -> Any:
    return load(None, [*SHOP, f"data.log.events={base}/log.csv", f"runs_dir={base}/runs", *words])


def write_log(base: Path, *, tuesday: bool) -> None:
    shop_log(tuesday=tuesday).write_csv(base / "log.csv")


def prepare_monday(base: Path) -> None:
    write_log(base, tuesday=False)
    STAGES["prepare"].run(shop(base))


def prepared(base: Path) -> Any:
    data = PreparedData.open(base / "runs" / "shop-prepare")
    return data.fingerprint, data.num_events


def overwritten(base: Path) -> None:
    prepare_monday(base)
    write_log(base, tuesday=True)


def nothing(base: Path) -> None:
    return None


def trained(base: Path) -> Any:
    folder = base / "runs" / "shop-pretrain"
    meta = read_meta(best_checkpoint(folder))
    losses = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    return meta["step"], meta["files"]["__0_0.distcp"], len(losses), (folder / "result.json").exists()


def with_lum(base: Path) -> None:
    prepare_monday(base)
    STAGES["pretrain"].run(shop(base))


def with_store(base: Path) -> None:
    with_lum(base)
    STAGES["query"].run(shop(base))


def with_newer_data(base: Path) -> None:
    with_store(base)
    write_log(base, tuesday=True)
    STAGES["prepare"].run(shop(base, "overwrite=true"))


def shop_store(base: Path) -> Any:
    return read_store(base / "runs" / "shop-query", ["1", "12", "new"])


def shop_answers(base: Path) -> Any:
    """The answers for rows and users, and the counts."""
    path = base / "runs" / "shop-query"
    rows = Knowledge.open(path, PreparedData.open(base / "runs" / "shop-prepare"))
    got = rows.for_rows(np.arange(len(rows.o)))
    result = {name: value for name, value in stage.RunFolder(path).result().items() if not name.endswith("_s")}
    del result["version"]
    return got.o_BND.tolist(), got.present_BN.tolist(), read_store(path, SHOP_USERS), result


FORGOTTEN = SHOP_USERS[5]


def small_stores(base: Path) -> None:
    for name in ("a", "b"):
        publish(base / "runs" / name, keys=[*KEYS, FORGOTTEN], seed=len(name))
    (base / "runs" / "a" / "building").mkdir()
    (base / "runs" / "a" / "building" / "identity.json").write_text("{}")


def forget_both(base: Path) -> None:
    forget(base / "runs", [FORGOTTEN])


def forgotten(base: Path) -> Any:
    assert holding(base / "runs", FORGOTTEN) == []
    return [read_store(base / "runs" / name, [*KEYS, FORGOTTEN]) for name in ("a", "b")]


def small_readers(base: Path) -> Any:
    """What both stores say of a user who is not forgotten."""
    return [read_store(base / "runs" / name, KEYS) for name in ("a", "b")]


def exported(base: Path) -> None:
    export_parquet(publish(base / "one", keys=["1", "2"]), base / "out")
    export_parquet(publish(base / "two", keys=["1", "2", "3"], seed=1), base / "newer")
    import_parquet(base / "out", base / "imported")


COMMANDS = {
    "prepare": Command(
        lambda base: write_log(base, tuesday=False), lambda base: STAGES["prepare"].run(shop(base)), nothing, prepared
    ),
    "prepare-overwrite": Command(
        overwritten, lambda base: STAGES["prepare"].run(shop(base, "overwrite=true")), prepared, prepared
    ),
    "checkpoint": Command(prepare_monday, lambda base: STAGES["pretrain"].run(shop(base)), nothing, trained),
    "pretrain-overwrite": Command(
        with_lum, lambda base: STAGES["pretrain"].run(shop(base, "overwrite=true")), nothing, trained
    ),
    "publish": Command(with_lum, lambda base: STAGES["query"].run(shop(base)), nothing, shop_answers),
    "refresh": Command(with_newer_data, lambda base: STAGES["query"].run(shop(base)), shop_store, shop_answers),
    "query-overwrite": Command(
        with_store, lambda base: STAGES["query"].run(shop(base, "overwrite=true")), shop_store, shop_answers
    ),
    "publish-small": Command(
        lambda base: publish(base / "run"),
        lambda base: publish(base / "run", seed=1),
        lambda base: read_store(base / "run", KEYS),
        lambda base: read_store(base / "run", KEYS),
    ),
    "forget": Command(small_stores, forget_both, small_readers, forgotten),
    "export": Command(
        exported,
        lambda base: export_parquet(base / "two", base / "out"),
        nothing,
        lambda base: pq.read_table(base / "out" / "users.parquet").drop_columns(["asked_at"]).to_pydict(),
    ),
    "import": Command(
        exported,
        lambda base: import_parquet(base / "newer", base / "imported"),
        lambda base: read_store(base / "imported", ["1"]),
        lambda base: read_store(base / "imported", ["1", "2", "3"]),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help=f"of {', '.join(COMMANDS)}, or forget=5 for 5 points; none = all")
    given = parser.parse_args()
    total = 0
    for command in given.commands or COMMANDS:
        name, _, points = command.partition("=")
        count = walk(name, int(points or 0))
        total += count
        print(f"{name:20} {count:5} points", flush=True)
    print(f"{'all':20} {total:5} points")


if __name__ == "__main__":
    main()
