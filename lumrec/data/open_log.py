"""Opens the raw log of a config, with the schema in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumrec.data.config import DataConfig
from lumrec.data.schema import SchemaConfig, validate
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.sources.registry import SOURCES
from lumrec.data.splits import SplitConfig, check_split
from lumrec.run import limits
from lumrec.run.errors import UserError


def read_source(data: DataConfig, schema: SchemaConfig, *, seed: int, scratch: Path) -> tuple[RawLog, SchemaConfig]:
    """The raw log of `data.source`, and the schema in use; `scratch` takes temporary files, and must outlive it.

    Raises what the source and the checks raise.
    """
    in_use = schema_in_use(data, schema)
    limits.check(data, "data")
    if data.request and data.source != "log":
        raise UserError(
            f"data.request: got {data.request!r} with data.source={data.source}; it names a column of source log only"
        )
    early = {"schema": in_use} if data.source == "log" else {}  # checked before its CSV files are converted
    return SOURCES[data.source].read(data, seed=seed, scratch=scratch, **early), in_use


def schema_in_use(data: DataConfig, schema: SchemaConfig) -> SchemaConfig:
    """The validated schema: the given one, or the source's own where that declares no feature."""
    if data.source == "served":
        raise UserError("data.source=served is for apps/prepare.py and apps/rank.py: its schema is that of the log")
    return validate(schema if schema.features else SOURCES[data.source].DEFAULT_SCHEMAS[data.source])


def named_files(files: Sequence[Path]) -> dict[str, Path]:
    """The files by name; where two have one name, by the end of their paths that tells them apart."""
    for parts in range(1, max((len(file.parts) for file in files), default=1) + 1):
        named = {"/".join(file.parts[-parts:]): file for file in files}
        if len(named) == len(set(files)):
            break
    return named


def request(data: DataConfig, schema: SchemaConfig, *, seed: int) -> dict[str, Any]:
    """What determines the prepared bytes; it is in the manifest, so that a folder made otherwise is recognised."""
    decides: dict[str, Any] = dataclasses.asdict(data)
    for name in ("path", "allow_other_files", *({"log", "simulator", "served"} - {data.source})):
        del decides[name]
    if data.source == "served":  # the schema is that of the log on which the served ranker was trained
        return {"data": {"served": decides["served"], "split": plain_split(data.split)}}
    if data.vocabulary_from:  # its fingerprint identifies it, beside the files
        decides["vocabulary_from"] = Path(data.vocabulary_from).name
    else:
        del decides["vocabulary_from"]
    if data.negatives is None:
        del decides["negatives"]
    decides["split"] = plain_split(data.split)
    wanted: dict[str, Any] = {"data": decides, "schema": dataclasses.asdict(schema_in_use(data, schema))}
    if data.source == "log":  # their checksums identify the files
        for name in ("events", "items", "users"):
            del decides["log"][name]
        for name in ("decimal_comma", "exact"):  # data prepared before there were these keep their request
            if not decides["log"][name]:
                del decides["log"][name]
    if data.source == "simulator":
        wanted["seed"] = seed
    return wanted


def plain_split(split: SplitConfig) -> dict[str, Any]:
    plain = {**dataclasses.asdict(split), "fractions": check_split(split)}
    if not split.rotation:
        del plain["rotation"]  # so data prepared before there was one keep their fingerprint
    return plain
