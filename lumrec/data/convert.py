"""Makes the files of a prepared folder from a raw log."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lumrec.data.drawn_rows import NegativeRows, NegativeRowsConfig, check_features_of_the_moment
from lumrec.data.forms import check_forms
from lumrec.data.ingest import Ingested, count_reasons, ingest
from lumrec.data.log_columns import derived_columns, of_roles
from lumrec.data.mapped import feature_file, write_mapped
from lumrec.data.numbers import number_facts
from lumrec.data.scaling import Moments, scaled, transformed
from lumrec.data.schema import EVENT_ROLES, FeatureConfig, SchemaConfig
from lumrec.data.simulator.simulate import click_facts
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.splits import PARTS, TEST, TRAIN, SplitConfig, assign_block, cut_times
from lumrec.data.vocabulary import build_vocabulary, count_values, encode
from lumrec.run.errors import UserError

FACT_ROWS = 10_000_000  # test events that the AUCs of a simulated log are taken over, at most


@dataclass(frozen=True)
class Catalogue:
    """Items or users: the frame, and how many training events each has."""

    frame: pl.DataFrame
    count_N: np.ndarray


@dataclass
class Encoder:
    """Vocabularies by table and moments by dense feature; unknown: values without a row or number, by feature."""

    vocabularies: dict[str, pl.DataFrame]
    moments: dict[str, Moments]
    unknown: dict[str, int] = field(default_factory=dict)

    def encode(
        self, columns: dict[str, pl.Series], features: dict[str, FeatureConfig], *, rows: pl.Series
    ) -> list[pl.Series]:
        """Vocabulary rows or scaled numbers of each feature; counts the unknown values.

        rows: identifies each row in a message. Raises UserError as `scaled` does.
        """
        encoded = []
        for name, feature in features.items():
            if feature.kind == "dense":
                values, missing = scaled(columns[name], feature.scale, self.moments[name], feature=name, rows=rows)
            else:
                values, missing = encode(columns[name], self.vocabularies[feature.table], feature.kind)
            self.unknown[name] = self.unknown.get(name, 0) + missing
            encoded.append(values.alias(name))
        return encoded


def convert(
    raw: RawLog,
    schema: SchemaConfig,
    split: SplitConfig,
    folder: Path,
    *,
    min_count: int = 1,
    max_list_length: int = 1000,
    drop_duplicates: bool = True,
    older: dict[str, pl.DataFrame] | None = None,
    negatives: NegativeRowsConfig | None = None,
) -> dict[str, Any]:
    """Writes every file of the prepared folder but the manifest; returns its counts, facts and quarantine.

    older: vocabularies by table that those of the same tables build on. negatives: rows to draw beside the events.
    The log is read in blocks of users; only the items, the users and the vocabularies are in memory as a whole.
    Raises UserError as `ingest` does, where published files do not hold what they should, and where negatives are asked
    for and cannot be drawn.
    """
    scratch = folder / "ingest"
    scratch.mkdir()
    found = ingest(raw, schema, max_list_length=max_list_length, drop_duplicates=drop_duplicates, scratch=scratch)
    by_role = {"item": found.items, "user": found.users}
    numbers = number_facts(schema, found.blocks, by_role)
    if raw.exact is not None:
        check_forms(schema, found.blocks, by_role, older or {}, raw.exact)
    cuts = cut_times(split, found.blocks, absolute_time=raw.absolute_time)
    catalogues = split_blocks(found, split, cuts)
    vocabularies = count_vocabularies(schema, found.blocks, catalogues, min_count, older or {})
    encoder = Encoder(vocabularies, fit_scales(schema, found.blocks, catalogues))
    if negatives:
        check_features_of_the_moment(schema, found.blocks)
    drawn = drawer(negatives, found, catalogues["item"], raw) if negatives else None
    _write_files(folder, schema, found, catalogues, encoder, drawn)
    left_out = count_reasons(found.quarantine)
    counts = count(found, catalogues, left_out)
    facts = _facts(folder / "events", len(found.items))
    facts["same_moment_share"] = found.num_with_earlier / found.num_events
    facts["no_history_share"] = found.num_without_history / found.num_events
    if raw.request:
        counts["events_without_request"] = found.num_by_themselves
    if drawn:
        counts["negatives"] = drawn.num_rows
        facts |= drawn.facts()
    shutil.rmtree(scratch)
    _check_expected(counts, raw)
    return {
        "counts": counts,
        "facts": facts,
        "table_rows": {table: len(vocabulary) + 1 for table, vocabulary in vocabularies.items()},
        "scales": {name: one.facts() for name, one in encoder.moments.items()},
        "absolute_time": raw.absolute_time,
        "has_clock": raw.has_clock,
        "utc_offset_hours": raw.utc_offset_hours,
        "derived": derived_columns(raw),
        "unknown_values": encoder.unknown,
        "numbers": {name: dataclasses.asdict(one) for name, one in numbers.items()},
        "quarantine": left_out,
    }


def _write_files(
    folder: Path,
    schema: SchemaConfig,
    found: Ingested,
    catalogues: dict[str, Catalogue],
    encoder: Encoder,
    drawn: NegativeRows | None,
) -> None:
    """Writes items, users, events, drawn rows, vocabularies and the quarantine."""
    for role, catalogue in catalogues.items():
        frame, key = catalogue.frame, f"{role}_key"
        kept = frame.select(pl.col(f"{role}_id").cast(pl.String).alias(key), "^title$")
        features = of_roles(schema, (role,))
        columns = {name: frame[feature.column] for name, feature in features.items()}
        write(kept.with_columns(encoder.encode(columns, features, rows=kept[key])), folder / f"{role}s.parquet")
    features = of_roles(schema, EVENT_ROLES)
    parts = [f"part-{index:05d}.parquet" for index in range(len(found.blocks))]
    for path, name in zip(found.blocks, parts, strict=True):
        block = pl.read_parquet(path)
        kept = block.select("user", "item", "timestamp", "rows_back", "order", "label", "split", "^probability$")
        encoded = encoder.encode({feature: block[feature] for feature in features}, features, rows=block["order"])
        write(kept.with_columns(encoded), folder / "events" / name)
        if drawn:
            write(drawn.add(block), folder / "negatives" / name)
    names = {name: name for name in kept.columns} | {"rows_back": "before"}
    names |= {feature: feature_file(schema.features, feature) for feature in features}
    write_mapped(folder, [folder / "events" / name for name in parts], names)
    if drawn:
        columns_of_drawn = {"event": "negative-event", "item": "negative-item"}
        write_mapped(folder, [folder / "negatives" / name for name in parts], columns_of_drawn)
    for table, vocabulary in encoder.vocabularies.items():
        write(vocabulary, folder / "vocabulary" / f"{table}.parquet")
    pl.scan_parquet(found.quarantine).sink_parquet(folder / "quarantine.parquet")


def drawer(config: NegativeRowsConfig, found: Ingested, items: Catalogue, raw: RawLog) -> NegativeRows:
    """Draws negative rows for the blocks of `found`, after `split_blocks` has added their column `split`."""
    ids = found.users["user_id"]
    return NegativeRows(config, items.count_N, ids, found.blocks, absolute_time=raw.absolute_time)


def split_blocks(found: Ingested, split: SplitConfig, cuts: np.ndarray | None) -> dict[str, Catalogue]:
    """Adds the column `split` (i8) to each block; the catalogues with their training events."""
    user_ids = found.users["user_id"].cast(pl.String)
    item_N, user_N = np.zeros(len(found.items), np.int64), np.zeros(len(found.users), np.int64)
    for path in found.blocks:
        block = pl.read_parquet(path)
        user_E = block["user"].to_numpy()
        first, last = int(user_E[0]), int(user_E[-1]) + 1
        split_E = assign_block(split, block, user_ids, cuts)
        is_train_E = split_E == TRAIN
        item_N += np.bincount(block["item"].to_numpy()[is_train_E], minlength=len(item_N))
        user_N[first:last] += np.bincount(user_E[is_train_E] - first, minlength=last - first)
        block = block.with_columns(pl.Series("split", split_E, pl.Int8))
        block.write_parquet(path, compression="lz4", statistics=False)
    return {"item": Catalogue(found.items, item_N), "user": Catalogue(found.users, user_N)}


def count_vocabularies(
    schema: SchemaConfig,
    blocks: list[Path],
    catalogues: dict[str, Catalogue],
    min_count: int,
    older: dict[str, pl.DataFrame],
) -> dict[str, pl.DataFrame]:
    """One vocabulary for each table; a value of an item (or user) counts once for each training event of the item."""
    counts: dict[str, list[pl.DataFrame]] = {table: [] for table in schema.tables}
    for feature in schema.features.values():
        if feature.table and feature.role in catalogues:
            catalogue = catalogues[feature.role]
            counts[feature.table].append(
                count_values(catalogue.frame[feature.column], pl.Series("count", catalogue.count_N))
            )
    for path in blocks:
        features = {name: f for name, f in of_roles(schema, EVENT_ROLES).items() if f.table}
        train = pl.read_parquet(path, columns=[*features, "split"]).filter(pl.col("split") == TRAIN)
        for name, feature in features.items():
            counts[feature.table].append(count_values(train[name]))
        # summed after each block, so that memory grows only with the number of different values
        counts = {table: [_summed(frames)] for table, frames in counts.items()}
    return {table: build_vocabulary(_summed(frames), min_count, older.get(table)) for table, frames in counts.items()}


def _summed(counts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(counts).group_by("key").agg(pl.col("count").sum())


def fit_scales(schema: SchemaConfig, blocks: list[Path], catalogues: dict[str, Catalogue]) -> dict[str, Moments]:
    """Moments of each dense feature over the training events, by feature name."""
    dense = {name: feature for name, feature in schema.features.items() if feature.kind == "dense"}
    moments = {name: Moments() for name in dense}
    for name, feature in dense.items():
        if feature.role in catalogues:
            catalogue = catalogues[feature.role]
            moments[name].add(transformed(catalogue.frame[feature.column], feature.scale), catalogue.count_N)
    of_events = [name for name, feature in dense.items() if feature.role not in catalogues]
    for path in blocks if of_events else []:
        train = pl.read_parquet(path, columns=[*of_events, "split"]).filter(pl.col("split") == TRAIN)
        for name in of_events:
            moments[name].add(transformed(train[name], dense[name].scale))
    return moments


def count(found: Ingested, catalogues: dict[str, Catalogue], left_out: dict[str, int]) -> dict[str, int]:
    """Rows read, kept and left out, users and items, and the events and users of each split."""
    blocks = pl.scan_parquet(found.blocks)
    counted = blocks.group_by("split").agg(events=pl.len(), users=pl.col("user").n_unique()).collect(engine="streaming")
    of_split = {row["split"]: row for row in counted.iter_rows(named=True)}
    users, items = (
        blocks.select(name).unique().select(pl.len()).collect(engine="streaming").item() for name in ("user", "item")
    )
    return {
        "events_read": found.num_read,
        "events": found.num_events,
        "events_quarantined": found.num_read - found.num_events,
        "users": len(catalogues["user"].frame),
        "users_without_events": len(catalogues["user"].frame) - users,
        "items": len(catalogues["item"].frame),
        "items_with_events": items,
        "items_in_training": int((catalogues["item"].count_N > 0).sum()),
        "catalogue_rows_quarantined": sum(n for reason, n in left_out.items() if not reason.startswith("events: ")),
        **{
            f"{name}_{what}": of_split[code][what] if code in of_split else 0
            for what in ("events", "users")
            for code, name in enumerate(PARTS)
        },
    }


def write(frame: pl.DataFrame, path: Path) -> None:
    """Writes one Parquet file, the same bytes for the same frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path, compression="zstd")


def _facts(events: Path, num_items: int) -> dict[str, float | None]:
    """Share of positive labels in each split and, for a simulated log, the known AUCs; None where undefined."""
    frame = pl.scan_parquet(events / "*.parquet")
    rates = dict(frame.group_by("split").agg(pl.col("label").mean()).collect(engine="streaming").iter_rows())
    facts: dict[str, float | None] = {f"{name}_positive_rate": rates.get(code) for code, name in enumerate(PARTS)}
    if "probability" in frame.collect_schema():
        train = frame.filter(pl.col("split") == TRAIN).group_by("item").agg(pl.col("label").sum())
        test = frame.filter(pl.col("split") == TEST).select("item", "label", "probability")
        every = test.select(pl.len()).collect(engine="streaming").item() // FACT_ROWS + 1
        some = test.with_row_index("index").filter(pl.col("index") % every == 0)  # gather_every needs all in memory
        known = click_facts(train.collect(engine="streaming"), some.collect(engine="streaming"), num_items)
        facts |= {name: None if np.isnan(value) else value for name, value in known.items()}
    return facts


def _check_expected(counts: dict[str, int], raw: RawLog) -> None:
    """Raises UserError where unmodified published files do not hold the known numbers of events, users, items."""
    expected = raw.extra.get("expected")
    assert expected is None or isinstance(expected, dict)
    for name, number in (expected or {}).items():
        if counts[name] != number:
            raise UserError(
                f"{raw.note}: {counts[name]:,} {name.replace('_', ' ')} were read, and the publisher's files hold "
                f"{number:,}: files are missing or were changed. Get them again, or set data.allow_other_files=true"
            )
