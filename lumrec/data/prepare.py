"""From a raw log to the prepared folder: checked, sorted, split, vocabularies from the training part, a manifest.

    manifest.json  events/part-00000.parquet  items.parquet  users.parquet  vocabulary/<table>.parquet  quarantine.parquet

The folder is built beside its place and renamed at the end, so that it appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

import torch.distributed as dist
from omegaconf import OmegaConf

from lumrec.data import simulator
from lumrec.data.convert import convert
from lumrec.data.manifest import NAME, PreparedDataError, sha256, write_manifest
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, validate
from lumrec.data.simulator import SimulatorConfig
from lumrec.data.sources import movielens
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.splits import SplitConfig, check_split


@dataclass(frozen=True)
class DataConfig:
    """Which log, and how it is split.

    source: movielens-1m | simulator. path: folder of the published files ("" = LUMREC_DATA, cache, download).
    allow_other_files: take files whose checksum is not the published one. min_count: a value that occurs less often in the
    training part is unknown (row 0 of its table).
    """

    source: str = "movielens-1m"
    path: str = ""
    allow_other_files: bool = False
    split: SplitConfig = field(default_factory=SplitConfig)
    min_count: int = 1
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)


def prepared_path(config: Any) -> Path:
    """Folder in which every later stage finds the prepared data: inputs.prepared, or "<name>-prepare", under runs_dir."""
    return Path(config.runs_dir) / (config.inputs.prepared or f"{config.name}-prepare")


def run(config: Any) -> Dict[str, Any]:
    """The prepare stage: makes the folder <runs_dir>/<run or "<name>-prepare"> and gives back what result.json holds.

    Under torchrun only rank 0 works; the others give back an empty dict.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return {}
    return prepare(config, Path(config.runs_dir) / (config.run or f"{config.name}-prepare"))


def open_or_prepare(config: Any, *, verify: bool = True) -> PreparedData:
    """The prepared data that a stage reads; made first, saying so, where the folder is missing.

    Every rank of a torch.distributed job may call this: rank 0 prepares, the others wait. Raises PreparedDataError where the
    default folder was prepared with another `data` or `schema` than the config asks for.
    """
    path = prepared_path(config)
    if not path.exists():
        _on_rank_0(lambda: _announce_and_prepare(config, path))
    data = PreparedData.open(path, verify=verify)
    if not config.inputs.prepared:
        _check_same_request(path, data.manifest["request"], request(config))
    return data


def prepare(config: Any, path: Path) -> Dict[str, Any]:
    """Makes the prepared folder at `path`, in place of an older one; gives back the flat facts of result.json.

    Raises ValueError for a config, schema or log that cannot be used (see the source), and DataSetMissing.
    """
    start = time.perf_counter()
    raw, schema = read_source(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        content = convert(raw, schema, config.data.split, config.data.min_count, work)
        manifest = write_manifest(
            work,
            {
                "dataset": config.data.source,
                "source": {"files": {file.name: sha256(file) for file in raw.files}, **raw.extra},
                "request": request(config),
                "schema": dataclasses.asdict(schema),
                "split": {**dataclasses.asdict(config.data.split), "fractions": check_split(config.data.split)},
                **content,
            },
        )
        result = {
            "dataset": manifest["dataset"],
            **manifest["counts"],
            **manifest["facts"],
            "fingerprint": manifest["fingerprint"],
            "wall_s": round(time.perf_counter() - start, 3),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        }
        (work / "config.yaml").write_text(_config_yaml(config))
        (work / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        _publish(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(summary(raw.note, manifest, path, result["wall_s"]), flush=True)
    return result


def read_source(config: Any) -> Tuple[RawLog, SchemaConfig]:
    """The raw log of `config.data.source` and the validated schema (the source's own where the config declares no feature)."""
    sources = {
        "movielens-1m": (
            lambda: movielens.read(config.data.path, allow_other_files=config.data.allow_other_files),
            movielens.DEFAULT_SCHEMA,
        ),
        "simulator": (lambda: simulator.read(config.data.simulator, seed=config.seed), simulator.DEFAULT_SCHEMA),
    }
    if config.data.source not in sources:
        raise ValueError(f"data.source: got {config.data.source!r}, expected one of {', '.join(sources)}")
    check_split(config.data.split)
    if config.data.min_count < 1:
        raise ValueError(f"data.min_count: got {config.data.min_count}, expected at least 1")
    read, default_schema = sources[config.data.source]
    schema = validate(config.schema if config.schema.features else default_schema)
    return read(), schema


def request(config: Any) -> Dict[str, Any]:
    """What of the config decides the prepared bytes; kept in the manifest so that a stage can tell a folder made otherwise."""
    data = dataclasses.asdict(config.data)
    data.pop("path")  # the same files may lie elsewhere
    data["split"]["fractions"] = check_split(config.data.split)
    if config.data.source != "simulator":
        data.pop("simulator")
    wanted = {"data": data, "schema": dataclasses.asdict(config.schema)}
    if config.data.source == "simulator":
        wanted["seed"] = config.seed
    return wanted


def summary(note: str, manifest: Dict[str, Any], path: Path, wall_s: float) -> str:
    """What was prepared, in a few lines for the terminal."""
    counts, facts = manifest["counts"], manifest["facts"]
    lines = [
        f"prepared {note}",
        f"  {counts['events']:,} events of {counts['users']:,} users on {counts['items']:,} items "
        f"({counts['items_in_training']:,} of them in the training part)",
        f"  split {manifest['split']['kind']}: {counts['train_events']:,} train, {counts['valid_events']:,} valid, "
        f"{counts['test_events']:,} test",
        f"  quarantined: {counts['events_quarantined']:,} of {counts['events_read']:,} events, "
        f"{counts['catalogue_rows_quarantined']:,} item or user rows",
    ]
    lines += [f"    {count:,} {reason}" for reason, count in manifest["quarantine"].items()]
    if "best_auc" in facts:
        lines.append(
            f"  best possible AUC on the test part {facts['best_auc']:.4f} (the true click probabilities); "
            f"by item popularity {facts['popularity_auc']:.4f}"
        )
    return "\n".join([*lines, f"  {path} ({wall_s:.1f} s)"])


def _publish(work: Path, path: Path) -> None:
    """Renames the finished folder to its place; an older prepared folder there goes, anything else is left and refused."""
    if path.exists():
        if not (path / NAME).is_file() and any(path.iterdir()):
            raise ValueError(
                f"{path} exists and holds no prepared data; remove it or choose another run name (run=...)"
            )
        print(f"replacing the prepared data in {path}", flush=True)
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
        os.rename(path, old / path.name)
        os.rename(work, path)
        shutil.rmtree(old)
    else:
        os.rename(work, path)


def _config_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _announce_and_prepare(config: Any, path: Path) -> None:
    print(f"no prepared data at {path}: preparing it now", flush=True)
    prepare(config, path)


def _on_rank_0(work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the other ranks wait; an error there is raised on every rank, so that none hangs."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        work()
        return
    outcome = [""]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[0]:
        raise RuntimeError(f"preparing failed on rank 0: {outcome[0]}")


def _check_same_request(path: Path, made: Dict[str, Any], wanted: Dict[str, Any]) -> None:
    old, new = dict(_flat(made)), dict(_flat(wanted))
    differences = [
        f"  {key}: {old.get(key, '(absent)')!r} in the folder, {new.get(key, '(absent)')!r} in the config"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key, "(absent)") != new.get(key, "(absent)")
    ]
    if differences:
        raise PreparedDataError(
            f"{path} was prepared with another config:\n"
            + "\n".join(differences)
            + "\nPrepare it again (apps/prepare.py with "
            "this config), choose another name=..., or name the folder in inputs.prepared to use it as it is."
        )


def _flat(values: Any, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
