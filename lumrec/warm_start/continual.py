"""Continual training: a LUM that continues from an earlier one, although its tables and its schema may have grown.

    table        rows of values known there: as they were      │ new rows: as row 0 ("unknown") was
    projection   columns of features known there: as they were │ columns of a new feature: zero
    all else     as it was; names and shapes must agree

So before the first step the new LUM answers every history as the earlier one did: values that are new in a history were
"unknown" to the earlier one, and a new feature has no effect yet. Both learn from the first step on, because new rows
get different gradients, and the table of a new feature is drawn at random.
"""

import itertools
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.data.common import Common
from lumrec.data.manifest import read_manifest
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, schema_from_dict
from lumrec.data.splits import TRAIN
from lumrec.data.vocabulary import moved_values, read_vocabularies
from lumrec.models.lum import ModelConfig, TrainedLum, open_lum_run, token_features
from lumrec.run.distributed import gathered, on_rank_zero
from lumrec.run.errors import UserError
from lumrec.train.checkpoint import verified_meta
from lumrec.train.checkpoint_reader import Reader
from lumrec.train.optimizers import table_shardings
from lumrec.warm_start import Audit, Rule, Rules, open_source, warm_start

TABLE_STATES = ("keep", "fresh")
_STATE_RULES = {"keep": "auto", "fresh": "drop"}  # what fits is checked before
# Settings of the model that change what it answers; the others do not, or show in features and shapes.
COMPARED_SETTINGS = ("encoder", "dim", "num_layers", "num_heads", "tokens", "similarity", "temperature")
TOKENS = "token_encoder."
TABLES = f"{TOKENS}tables.embedding_bags."
# The learned token of a LUM without any condition feature, and what does its work once there is one.
CONSTANT, BIAS = f"{TOKENS}condition_constant_D", f"{TOKENS}condition_projection.bias"
PROJECTIONS = {kind: f"{TOKENS}{kind}_projection.weight" for kind in ("item", "condition")}


class Earlier(NamedTuple):
    """A finished LUM run to start from: its best checkpoint, its parameters' shapes, and what it was trained with.

    prepared, manifest: of the data that it was trained on.
    """

    run: str
    checkpoint: Path
    parameters: dict[str, list[int]]
    model: ModelConfig
    schema: SchemaConfig
    prepared: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the checkpoint."""
        return (self.checkpoint / "COMPLETE").read_text(encoding="utf-8").strip()


def earlier_run(common: Common, start_from: str) -> tuple[str, TrainedLum]:
    """The name and the LUM of the run that `start_from` names; no data are read.

    In the name, {fold} is replaced by "kofK" of common.fold. Raises MissingFileError where there is no such run, and
    UserError where it is this one.
    """
    name = start_from.replace("{fold}", common.fold.replace("/", "of"))
    folder = common.find_run(name)
    if folder.resolve() == common.folder("pretrain").resolve():
        raise UserError(f"pretrain.start_from={name} is this run itself; choose another run=<name>")
    return name, open_lum_run(
        folder,
        missing=f"pretrain.start_from={name}: there is no finished LUM in {folder}; expected the name of a run of "
        f"apps/pretrain.py under {common.runs_dir}, or its folder",
    )


def open_earlier(common: Common, model: ModelConfig, start_from: str, schema: SchemaConfig) -> Earlier:
    """The run that `start_from` names, as far as a LUM of `model` on this schema can continue from it; reads no data.

    Raises MissingFileError where the run or its prepared data is missing; UserError, which names what differs and how
    to mend it, where the LUM would be another model, or a feature that it reads is gone or changed.
    """
    name, lum = earlier_run(common, start_from)
    trained = lum.common
    if common.fold not in ("", trained.fold):
        raise UserError(
            f"fold={common.fold} keeps users from this LUM, and {name} (fold={trained.fold or '(none)'}) has seen "
            "them: start from the LUM of the same fold; pretrain.start_from=…{fold} names it for each"
        )
    manifest = read_manifest(lum.prepared, verify=False)
    trained_on = lum.meta["fingerprint"].get("data", "not recorded")
    if trained_on != manifest["fingerprint"]:
        raise UserError(
            f"{lum.prepared} is not what {name} was trained on (fingerprint {manifest['fingerprint']}, then "
            f"{trained_on}), so the values of its rows are not known: prepare that log again as it was"
        )
    then = schema_from_dict(manifest["schema"])
    earlier = Earlier(name, lum.checkpoint, lum.meta["parameters"], lum.model, then, lum.prepared, manifest)
    _check_settings(earlier, model)
    _check_features(earlier, model, schema)
    return earlier


def find_earlier(common: Common, model: ModelConfig, start_from: str, data: PreparedData) -> Earlier:
    """The run that `start_from` names, if a LUM of `model` on these data can continue from it. Collective.

    Raises as `open_earlier` does, and UserError where its checkpoint is damaged, a value has another row, or the
    earlier LUM has seen what this run holds out.
    """
    earlier = open_earlier(common, model, start_from, data.schema)
    verified_meta(earlier.checkpoint)
    if earlier.manifest["fingerprint"] != data.fingerprint:
        on_rank_zero(lambda: _check_vocabularies(earlier, data))
        on_rank_zero(lambda: _check_split(earlier, data))
    return earlier


def _check_settings(earlier: Earlier, model: ModelConfig) -> None:
    differences = [
        f"model.{name} is {getattr(earlier.model, name)!r} there, {getattr(model, name)!r} here"
        for name in COMPARED_SETTINGS
        if getattr(earlier.model, name) != getattr(model, name)
    ]
    if differences:
        raise UserError(
            f"a LUM cannot continue from {earlier.run} as another model: {'; '.join(differences)}. Use its settings, "
            "or train a new one without pretrain.start_from"
        )


def _check_features(earlier: Earlier, model: ModelConfig, schema: SchemaConfig) -> None:
    """Raises UserError unless all that the earlier LUM reads is still there: in the same role, table and width."""
    before, now = token_features(earlier.model, earlier.schema), token_features(model, schema)
    problems = []
    for kind, names in before.items():
        for name in names:
            old, new = earlier.schema.features[name], schema.features.get(name)
            if new is None or name not in now[kind]:
                problems.append(f"it reads {name!r} ({old.role}), which this LUM does not")
            elif (old.role, old.kind, old.table) != (new.role, new.kind, new.table):
                was, is_ = (f"{f.role}, {f.kind}, table {f.table}" for f in (old, new))
                problems.append(f"{name!r} was {was}; now it is {is_}")
            elif (width := earlier.schema.tables[old.table].width) != schema.tables[new.table].width:
                problems.append(
                    f"table {old.table!r} was {width} wide; now it is {schema.tables[new.table].width}: set "
                    f"schema.tables.{old.table}.width={width}"
                )
    if problems:
        raise UserError(
            f"a LUM cannot continue from {earlier.run} with this schema: {'; '.join(dict.fromkeys(problems))}. "
            "Features may be added, none changed or taken away"
        )


def _check_vocabularies(earlier: Earlier, data: PreparedData) -> None:
    """Raises UserError unless every value that the earlier LUM knows has the same row in `data`."""
    prepared = earlier.prepared
    before, now = read_vocabularies(prepared)[1], read_vocabularies(data.path)[1]
    for parameter in earlier.parameters:
        if not parameter.startswith(TABLES):
            continue
        table = _table_of(parameter)
        moved = moved_values(before[table], now[table])
        if len(moved):
            key, row, row_now = moved.row(0)
            place = "no row" if row_now is None else f"row {row_now}"
            raise UserError(
                f"the rows of {data.path} are not those of {prepared}, which {earlier.run} was trained on: table "
                f"{table!r} has {len(moved):,} of {len(before[table]):,} values elsewhere ({key!r} was row {row}, now "
                f"it has {place}). Prepare this log with " + shlex.quote(f"data.vocabulary_from={prepared.name}")
            )


def _check_split(earlier: Earlier, data: PreparedData) -> None:
    """Raises UserError where the earlier LUM may have learned from an event that `data` holds out.

    It cannot have where everything that it learned from is older than what is held out. Nor where the same rule split a
    log that has only grown: a user's first events, or users by a hash of their keys, stay in the training part.
    """
    split, split_before = data.manifest["split"], earlier.manifest["split"]
    held_out = data.timestamp[data.split != TRAIN]
    if (split == split_before and split["kind"] != "time") or not len(held_out):
        return
    training = pl.scan_parquet(earlier.prepared / "events" / "*.parquet").filter(pl.col("split") == TRAIN)
    last = training.select(pl.col("timestamp").max()).collect(engine="streaming").item()
    if not data.absolute_time or last >= held_out.min():
        raise UserError(
            f"{earlier.run} may have learned from events that this data holds out for evaluation: its data.split was "
            f"{split_before}, up to {_date(last)}; here it is {split}, and held out is what comes from "
            f"{_date(held_out.min())} on. Use the same data.split, or kind: time with times after those"
        )


def _date(second: int) -> str:
    return datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def start_from(
    model: DistributedModelParallel, earlier: Earlier, config: ModelConfig, schema: SchemaConfig, *, table_state: str
) -> Audit:
    """Loads the earlier LUM into `model` (from `parallel.shard`), in place; gives the audit of it. Collective.

    config, schema: of `model`. table_state: "keep" loads the tables' optimizer state too (new rows have none yet), so
    that trained rows continue in small steps; "fresh" starts it again. All other state always starts again.
    Each rank reads only the rows that it holds. Raises UserError, before anything is loaded, for parameters that do
    not fit, and for state that is to be kept and does not fit.
    """
    if table_state not in TABLE_STATES:
        raise UserError(f"pretrain.table_state is {table_state!r}; expected one of {', '.join(TABLE_STATES)}")
    theirs = earlier.parameters
    ours = {name: value for name, value in model.state_dict().items() if hasattr(value, "size")}
    sources = {name: CONSTANT if name == BIAS and CONSTANT in theirs else name for name in ours}
    parts = _old_columns(earlier, token_features(config, schema), schema)
    _check_parameters(earlier, ours, sources, parts)
    if table_state == "keep":
        _check_table_states(model, earlier)
    rules = [
        Rule(sources[name], name, optimizer="drop", columns="pad_zero", parts=[list(part) for part in parts[name]])
        if name in parts
        else Rule(sources[name], name, rows="grow", new_rows="unknown", optimizer=_STATE_RULES[table_state])
        if name.startswith(TABLES)
        else Rule(sources[name], name, optimizer="drop")
        for name in ours
        if sources[name] in theirs
    ]
    fresh = [name for name in ours if sources[name] not in theirs]
    source = open_source(earlier.checkpoint, verify=False)  # `find_earlier` has verified it
    audit = warm_start(model, source, Rules(rules, source_prefix="model.", optimizer_prefix="optim.", fresh=fresh))
    with torch.no_grad():
        for name in fresh:
            if name in parts:  # of a LUM that had no condition feature: all columns are new
                ours[name].zero_()
    return audit


def growth_table(audit: Audit) -> str:
    """The audit of `start_from` as text: a line for each table and projection, one line for all others."""
    shown = [row for row in audit.rows if row.target.startswith((TABLES, *PROJECTIONS.values()))]
    text = replace(audit, rows=shown, states_left=[], others=[]).text()
    return f"{text}\n{len(audit.rows) - len(shown)} other parameters are as they were"


def _old_columns(
    earlier: Earlier, features: Mapping[str, list[str]], schema: SchemaConfig
) -> dict[str, list[tuple[int, int, int]]]:
    """For each projection of the new LUM, (column in the earlier one, number, column now) of each feature it had."""
    before, columns = token_features(earlier.model, earlier.schema), {}
    for kind, names in features.items():
        first = _first_columns(before[kind], earlier.schema)
        now = _first_columns(names, schema)
        if names:
            columns[PROJECTIONS[kind]] = [
                (first[name], schema.tables[schema.features[name].table].width, now[name])
                for name in names
                if name in first
            ]
    return columns


def _first_columns(names: Sequence[str], schema: SchemaConfig) -> dict[str, int]:
    widths = [schema.tables[schema.features[name].table].width for name in names]
    return dict(zip(names, itertools.accumulate(widths, initial=0)))


def _check_parameters(
    earlier: Earlier, ours: Mapping[str, Any], sources: Mapping[str, str], columns: Collection[str]
) -> None:
    """Raises UserError for parameters that are missing in one of the two, or of a shape that no growth explains."""
    theirs, known = earlier.parameters, set(sources.values())
    problems = [f"{name} is not in this model" for name in theirs if name not in known]
    for name, value in ours.items():
        here, there = list(value.size()), theirs.get(sources[name])
        if there is None:  # a new table, or the first condition feature
            fits = name.startswith(TABLES) or (name in columns and CONSTANT in theirs)
        elif name.startswith(TABLES):
            fits = there[0] <= here[0] and there[1] == here[1]
        else:
            fits = there[0] == here[0] if name in columns else there == here
        if not fits:
            problems.append(f"{name} is {there or 'absent'} there, {here} here")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(
            f"a LUM cannot continue from {earlier.run} as another model: {'; '.join(problems[:6])}{more}. Use the "
            "settings of `model` that it was trained with"
        )


def _check_table_states(model: DistributedModelParallel, earlier: Earlier) -> None:
    """Raises UserError, on every rank, for a table's optimizer state that is not there or does not grow with its rows.

    Collective.
    """
    stored, weights = Reader(earlier.checkpoint).sizes(), model.state_dict()
    problems = [
        f"{name} is data_parallel, where its optimizer is not made yet"
        for name, sharding in table_shardings(model).items()
        if name in earlier.parameters and sharding.sharding_type == "data_parallel"
    ]
    for name, entries in model.fused_optimizer.state_dict()["state"].items():
        for entry, value in entries.items() if name in earlier.parameters else ():
            key = f"optim.{name}.{entry}"
            expected = [earlier.parameters[name][0], *value.size()[1:]]
            if stored.get(key) != expected or value.size()[0] != weights[name].size()[0]:
                problems.append(f"{key} is {stored.get(key, 'absent')} there, {list(value.size())} here")
    if problems := sorted({problem for part in gathered(problems) for problem in part}):
        raise UserError(
            f"the tables' optimizer state of {earlier.run} does not fit: {'; '.join(problems[:6])}. Use the "
            "table_optimizer and sharding that it was trained with, or start it again: pretrain.table_state=fresh"
        )


def _table_of(parameter: str) -> str:
    return parameter.removeprefix(TABLES).removesuffix(".weight")
