"""Makes a prepared folder, which every later stage reads, from a raw log.

    manifest.json  events/part-00000.parquet  mapped/item.npy  items.parquet  users.parquet  vocabulary/<table>.parquet
    quarantine.parquet  (rows left out, and why)        beside them config.yaml and result.json
    negatives/part-00000.parquet  (with data.negatives: rows drawn beside the events)

The folder is built beside its place and renamed at the end, so that it appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from lumrec.data.common import Common
from lumrec.data.config import DataConfig
from lumrec.data.convert import convert
from lumrec.data.drawn_rows import NegativeRowsConfig, draw_lines, draw_warnings
from lumrec.data.forgotten import blank_quarantine, files_with, read_forgotten, without_forgotten
from lumrec.data.labels import check_labels
from lumrec.data.manifest import NAME, PreparedDataError, read_manifest, write_manifest
from lumrec.data.mapped import FOLDER, KEPT
from lumrec.data.moments import seen_line, seen_warnings
from lumrec.data.numbers import number_lines
from lumrec.data.open_log import named_files, plain_split, read_source, request, schema_in_use
from lumrec.data.own_log.config import as_list
from lumrec.data.own_log.folders import find_files
from lumrec.data.own_log.read import damaged_file
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, schema_from_dict
from lumrec.data.served import FEATURES, ROWS, ServedData, served_files, write_served
from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.data.split_notes import split_line, split_warnings
from lumrec.data.splits import PARTS, SplitConfig
from lumrec.data.vocabulary import read_vocabularies
from lumrec.run.changes import differing
from lumrec.run.distributed import check_shared, on_rank_zero
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import full_disk_told, leftovers, locked, read_json, replace_folder, sha256
from lumrec.run.folder import names_in
from lumrec.run.printable import say
from lumrec.run.typed_yaml import to_yaml

MADE = {NAME, "config.yaml", "events", FOLDER, "items.parquet", "users.parquet", "vocabulary", "quarantine.parquet"}
OPTIONAL = {"negatives", "result.json", ROWS, FEATURES, KEPT}
ROOM = "what was there is as it was. Make room and run the same command again"
ITEM_ID = ("item", "item_id")  # role and column of the feature that tells items apart
FEW_ITEMS = 10  # of an earlier log: none of so few may occur in the next one
VOCABULARY = "data.vocabulary_from"  # where the manifest's files name the fingerprint of the earlier log


def _request(common: Common) -> dict[str, Any]:
    return request(common.data, common.schema, seed=common.seed)


def schema_to_read(common: Common) -> SchemaConfig:
    """The schema of the data that `open_or_prepare` gives, before these are made or opened. Raises as it does."""
    if common.data.source == "served":
        return schema_from_dict(read_manifest(_served_places(common)[1], verify=False)["schema"])
    if common.inputs.prepared:
        return schema_from_dict(read_manifest(common.prepared, verify=False)["schema"])
    return schema_in_use(common.data, common.schema)


def open_or_prepare(common: Common, *, make: bool = True, served: bool = False) -> PreparedData:
    """The prepared data that a stage reads; the default folder is made first, saying so, where it is missing.

    Every rank of a torch.distributed job must call this: rank 0 prepares, the others wait. Raises PreparedDataError
    where the default folder was prepared with another `data` or `schema` than the config asks for; a folder that is
    named in inputs.prepared is taken as it is. Where not `make`, a missing folder raises MissingFileError, with the
    command that makes it. served: rows that a server has scored will do; else they raise UserError.
    """
    path = common.prepared
    if not make and not path.exists():
        raise MissingFileError(
            f"there is no prepared data in {path}; make it with: torchx run apps/prepare.py --config <your config>"
        )
    if not common.inputs.prepared:
        check_shared(path.parent)
        on_rank_zero(lambda: _make_if_missing(common, path))
    data = open_prepared(path)
    if isinstance(data, ServedData) and not served:
        raise UserError(f"{path} holds rows that a server has scored (data.source=served); only rankers train on them")
    if not common.inputs.prepared and (differences := _differences(data.manifest["request"], _request(common))):
        raise PreparedDataError(
            f"{path} was prepared with another config:\n{differences}\nPrepare it again (apps/prepare.py with "
            "overwrite=true), choose another name=..., or name the folder in inputs.prepared to use it as it is."
        )
    return data


def open_prepared(path: Path) -> PreparedData:
    """The prepared data of a folder, `ServedData` where it holds served rows. Raises as `PreparedData.open`, and
    UserError where the log that served rows are of was prepared again.
    """
    if not (path / FEATURES).is_file():
        return PreparedData.open(path)
    manifest = read_manifest(path)
    base = PreparedData.open(manifest["base"]["folder"])
    if base.fingerprint != manifest["base"]["fingerprint"]:
        raise PreparedDataError(
            f"{path} holds served rows of the prepared data {base.path} with the fingerprint "
            f"{manifest['base']['fingerprint']}, which now has {base.fingerprint}: prepare both again"
        )
    return ServedData(path, manifest, base)


def prepare(common: Common, path: Path) -> dict[str, Any]:
    """Makes the prepared folder at `path`; gives back the flat facts of result.json.

    A whole folder that was prepared with the same config from the same files stays as it is. Raises UserError for a
    config, schema or log that cannot be used, for a folder that was prepared with another config (unless
    common.overwrite) or that is no prepared folder, and DataSetMissing.
    """
    start = time.perf_counter()
    data = common.data
    path = _checked_place(path)
    forgotten = read_forgotten(common.runs)
    if data.source == "served":
        return _prepare_served(common, path, forgotten)
    full_disk = full_disk_told(path.parent, f"what is prepared for {path.name}", then=ROOM)
    with _claimed(path) as work, full_disk:
        (scratch := work / "source").mkdir()
        with read_to_its_end(data):
            older_fingerprint, older = _older_vocabularies(common, path)
            raw, schema = read_source(data, common.schema, seed=common.seed, scratch=scratch)
            files = {name: sha256(file) for name, file in named_files(raw.files).items()}
            if older:
                files[VOCABULARY] = older_fingerprint
            current = _current_result(path, common, files, forgotten)
            if current is not None:
                say(f"{path} is prepared already, with this config and these files (overwrite=true makes it again)")
                return current
            content = convert(
                without_forgotten(raw, forgotten),
                schema,
                data.split,
                work,
                min_count=data.min_count,
                max_list_length=data.max_list_length,
                drop_duplicates=data.duplicates == "drop",
                older=older,
                negatives=data.negatives,
            )
        shutil.rmtree(scratch)
        blank_quarantine(work / "quarantine.parquet", forgotten)
        before = read_manifest(common.find_run(data.vocabulary_from), verify=False) if data.vocabulary_from else None
        check_labels(data, content, before["facts"].get("train_positive_rate") if before else None)
        manifest = write_manifest(
            work,
            {
                "dataset": data.source,
                "source": {"files": files, **raw.extra},
                "request": _request(common),
                "schema": dataclasses.asdict(schema),
                "split": plain_split(data.split),
                **content,
                **_growth(older_fingerprint, older, work, schema),
                **({"forgotten": sorted(forgotten)} if forgotten else {}),
            },
        )
        result = {
            "dataset": manifest["dataset"],
            **manifest["counts"],
            **manifest["facts"],
            "fingerprint": manifest["fingerprint"],
            "wall_s": round(time.perf_counter() - start, 3),
            **({"note": "; ".join(found)} if (found := warnings(manifest)) else {}),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        }
        (work / "config.yaml").write_text(to_yaml(common.settings()), encoding="utf-8")
        (work / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        replace_folder(work, path)
    say(summary(raw.note, manifest, path, result["wall_s"]))
    return result


def _served_places(common: Common) -> tuple[Path, Path]:
    """The folder of what was served, and that of the prepared data of its ranker."""
    served = common.data.served
    if not (served.log and served.prepared):
        raise UserError(
            "data.source=served needs data.served.log (the folder of serve.log) and data.served.prepared (the prepared "
            "data that the served ranker was trained on)"
        )
    return common.find_run(served.log), common.find_run(served.prepared)


def _prepare_served(common: Common, path: Path, forgotten: set[str]) -> dict[str, Any]:
    """`prepare` for what a server has scored: there is no raw log, and features are taken as they were scored."""
    start, (log, prepared) = time.perf_counter(), _served_places(common)
    base = PreparedData.open(prepared)
    full_disk = full_disk_told(path.parent, f"what is prepared for {path.name}", then=ROOM)
    with _claimed(path) as work, full_disk:
        files = {name: sha256(file) for name, file in named_files(served_files(log)).items()}
        if (current := _current_result(path, common, files, forgotten)) is not None:
            say(f"{path} is prepared already, with this config and these files (overwrite=true makes it again)")
            return current
        content = write_served(common.data.served, common.data.split, log, base, work, forgotten)
        about = {"dataset": "served", "source": {"files": files}, "request": _request(common)}
        about |= {"schema": base.manifest["schema"], "split": plain_split(common.data.split), **content}
        manifest = write_manifest(work, about | ({"forgotten": sorted(forgotten)} if forgotten else {}))
        result = {"dataset": "served", **content["counts"], "fingerprint": manifest["fingerprint"]}
        result |= {"wall_s": round(time.perf_counter() - start, 3)}
        (work / "config.yaml").write_text(to_yaml(common.settings()), encoding="utf-8")
        (work / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        replace_folder(work, path)
    counts = content["counts"]
    say(
        f"prepared {counts['events']:,} rows of {counts['scored']:,} scored candidates ({counts['with_event']:,} with "
        f"an event; {', '.join(f'{counts[part]:,} {part}' for part in PARTS)}) of the bundle "
        f"{content['served']['bundle']}\n  {path}"
    )
    return result


@contextlib.contextmanager
def read_to_its_end(data: DataConfig) -> Iterator[None]:
    """Turns polars' errors about a damaged file of the log into one UserError; its other errors are bugs of ours."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        file = damaged_file(data.log) if data.source == "log" else None
        if file is None and not (isinstance(error, pl.exceptions.ComputeError) and data.source != "log"):
            raise
        raise UserError(
            f"{file or 'the log'} cannot be read to its end: {str(error).splitlines()[0]}. It is damaged: copy or "
            "write it again"
        ) from error


def _older_vocabularies(common: Common, path: Path) -> tuple[str, dict[str, pl.DataFrame]]:
    """Fingerprint and vocabularies of the log that data.vocabulary_from names; ("", {}) where it names none."""
    if not common.data.vocabulary_from:
        return "", {}
    folder = common.find_run(common.data.vocabulary_from)
    if folder.resolve() == path.resolve():
        raise UserError(
            f"data.vocabulary_from: {folder} is the folder to be made, and LUMs of it would lose their data; choose "
            "another run=<name>"
        )
    return read_vocabularies(folder)


def _growth(fingerprint: str, older: dict[str, pl.DataFrame], folder: Path, schema: SchemaConfig) -> dict[str, Any]:
    """The manifest's entry about vocabularies that build on older ones; empty where they do not.

    taken: values of the older one; found: those of them that this log's training part has; new: values that it adds.
    Raises UserError where none of many items of the older log is in this one: then the ids are written in another way.
    """
    if not older:
        return {}
    tables = {}
    of_items = {feature.table for feature in schema.features.values() if (feature.role, feature.column) == ITEM_ID}
    for file in sorted((folder / "vocabulary").glob("*.parquet")):
        vocabulary, before = pl.read_parquet(file), older.get(file.stem)
        taken = 0 if before is None else len(before)
        found = int((vocabulary["count"].head(taken) > 0).sum())
        tables[file.stem] = {"taken": taken, "found": found, "new": len(vocabulary) - taken}
        if file.stem in of_items and taken >= FEW_ITEMS and not found and len(vocabulary) > taken:
            there, here = vocabulary["key"][0], vocabulary["key"][taken]
            raise UserError(
                f"data.vocabulary_from: none of its {taken:,} items is in the training part of this log (there "
                f"{there!r}, say, and here {here!r}): name the earlier log of this shop, or write the ids as it does"
            )
    return {"vocabulary_from": {"fingerprint": fingerprint, "tables": tables}}


def summary(note: str, manifest: dict[str, Any], path: Path, wall_s: float) -> str:
    """What was prepared, in a few lines for the terminal."""
    counts, facts = manifest["counts"], manifest["facts"]
    lines = [
        f"prepared {note}",
        f"  {counts['events']:,} events of {counts['users']:,} users on {counts['items']:,} items "
        f"({counts['items_in_training']:,} of them in the training part)",
        f"  split {manifest['split']['kind']}: {split_line(counts)}",
        f"  quarantined: {counts['events_quarantined']:,} of {counts['events_read']:,} events, "
        f"{counts['catalogue_rows_quarantined']:,} item or user rows",
    ]
    lines += [f"    {count:,} {reason}" for reason, count in manifest["quarantine"].items()]
    lines.append(f"  {seen_line(facts['same_moment_share'], has_clock=manifest['has_clock'])}")
    if "events_without_request" in counts:
        lines.append(f"  {counts['events_without_request']:,} events have no request: each was shown by itself")
    lines += [f"  {line}" for line in number_lines(manifest["numbers"])]
    if "vocabulary_from" in manifest:
        tables = manifest["vocabulary_from"]["tables"].items()
        growth = "; ".join(
            f"{table} {rows['taken']:,} taken ({rows['found']:,} of them found here), {rows['new']:,} new"
            for table, rows in tables
        )
        lines.append(f"  vocabularies build on {manifest['vocabulary_from']['fingerprint']}: {growth}")
    if facts.get("best_auc") is not None:
        lines.append(
            f"  best possible AUC on the test part {facts['best_auc']:.4f} (the true click probabilities); "
            f"by item popularity {facts['popularity_auc']:.4f}"
        )
    if "negatives" in counts:
        lines.append(f"  {counts['negatives']:,} negative rows drawn beside the events")
        lines += [f"    {line}" for line in draw_lines(facts)]
    lines += [f"  ! {warning}" for warning in warnings(manifest)]
    return "\n".join([*lines, f"  {path} ({wall_s:.1f} s)"])


def warnings(manifest: dict[str, Any]) -> list[str]:
    """Sentences about what makes metrics on this prepared data misleading."""
    rule, negatives = manifest["split"], manifest["request"]["data"].get("negatives")
    split = SplitConfig(**{**rule, "fractions": [] if rule["times"] else rule["fractions"]})
    found = split_warnings(split, manifest["counts"], absolute_time=manifest["absolute_time"])
    found += seen_warnings(manifest["facts"]["no_history_share"])
    least = manifest["request"]["data"]["min_count"]
    found += [
        f"no value of table {table!r} occurs {least:,} times in the training part (data.min_count): all of them share "
        "the row of unknown values"
        for table, rows in manifest["table_rows"].items()
        if rows == 1 and least > 1
    ]
    return found + (draw_warnings(NegativeRowsConfig(**negatives), manifest["facts"]) if negatives else [])


def _make_if_missing(common: Common, path: Path) -> None:
    if not path.exists():
        say(f"no prepared data at {path}: preparing it now")
        prepare(common, path)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to work in, locked while in use; what a killed process left there is removed."""
    work = path.with_name(f".{path.name}.preparing")
    with locked(work, folder=True, waiting=f"waiting for another process that prepares {path}"):
        try:
            for left in [*leftovers(path.parent, path.name), *work.iterdir()]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _checked_place(path: Path) -> Path:
    """The folder `path`, or what it is a link to. Raises UserError where a folder cannot be renamed to it."""
    names_in(path)  # raises for a file and a broken link
    if path.is_mount():
        raise UserError(
            f"{path} is a mount: prepared data are built beside their folder and renamed to it. Mount {path.parent} "
            "instead, or choose another run=<name>"
        )
    return path.resolve() if path.is_symlink() else path


def check_replaceable(path: Path) -> None:
    """Raises UserError for a folder that the prepare stage did not make, or that holds anything else besides."""
    names = names_in(path)
    if NAME not in names:
        raise UserError(f"{path} exists and holds no prepared data; remove it or choose another run=<name>")
    try:
        manifest = read_json(path / NAME)
        ours = isinstance(manifest.get("request"), dict) and "format_version" in manifest
    except UserError:
        ours = MADE <= names  # the manifest is damaged, and the rest is what we write
    if not ours or names - MADE - OPTIONAL:
        stranger = sorted(names - MADE - OPTIONAL)
        raise UserError(
            f"{path} was not made by the prepare stage{f' (it holds {stranger[0]})' if stranger else ''}, and is never "
            "replaced; remove it yourself, or choose another run=<name>"
        )


def _current_result(
    path: Path, common: Common, files: dict[str, str], forgotten: Collection[str]
) -> dict[str, Any] | None:
    """result.json of a folder that needs no work; None where it is missing or to be overwritten.

    Raises UserError where the folder is something else, damaged, prepared with another config or from other files, or
    holds forgotten users. A folder without result.json is what the pipeline leaves of one that is to be made again.
    """
    if not path.exists() or not any(path.iterdir()):
        return None
    check_replaceable(path)
    if common.overwrite or not (path / "result.json").exists():
        return None
    manifest = read_manifest(path)
    differences = _differences(
        {**manifest["request"], "files": manifest["source"]["files"]}, {**_request(common), "files": files}
    )
    if differences:
        raise UserError(
            f"{path} was prepared with another config or from other files:\n{differences}\n"
            "Use overwrite=true to replace it, or run=<name> for another folder."
        )
    if found := files_with(path, forgotten):
        raise UserError(
            f"{path} holds forgotten users ({', '.join(found)}). Use overwrite=true to prepare it again without them."
        )
    return read_json(path / "result.json", again="prepare it again with overwrite=true")


def changed_files(path: Path, data: DataConfig) -> list[str]:
    """The files of your log that are not those `path` was prepared from, "file <name>: changed" (or new, or
    gone) each; one line too where `path` is damaged.

    [] for every other source, whose published files are checked where they are read, and, saying so, where the log is
    not there any more: what was prepared from it is kept.
    """
    if data.source != "log":
        return []
    given = {name: as_list(getattr(data.log, name)) for name in ("events", "items", "users")}
    try:
        made = read_manifest(path, verify=False)["source"]["files"]
        files = [file for name, of in given.items() if of for file in find_files(of, f"data.log.{name}")]
    except PreparedDataError as error:
        return [str(error)]
    except DataSetMissing as error:
        say(f"{path} is used as it was prepared; whether the log has changed is not known: {error}")
        return []
    now = {name: sha256(file) for name, file in named_files(files).items()}
    names = sorted({*made, *now} - {VOCABULARY})
    how = {name: "new" if name not in made else "gone" if name not in now else "changed" for name in names}
    return [f"file {name}: {how[name]}" for name in names if made.get(name) != now.get(name)]


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """One line for each entry that differs; "" where none does."""
    return "\n".join(f"  {key}: {old!r} in the folder, {new!r} asked for" for key, old, new in differing(made, wanted))
