"""Features of a request: 100 candidates of a user with 50, 1,024 and 4,096 events, from the stored state to the batch.

    python benchmarks/requests.py [--candidates 100] [--events 50 1024 4096] [--repeats 100] [--kind all]

On one core, with the simulator's schema (four item features, one of them a list; statistics and TWIN's counts of all
events; the ranker reads the whole history). The parts: `read` (bytes of the state to arrays) and `batch` (raw keys to
the RankBatch, keys from the LMDB of a bundle); then, by the batch of 32 users at once, what one of them takes. The
plain baseline makes the same batch by the code of training: a log that holds only this user, with the candidates as
drawn rows, through the statistics of all rows and RowBuilder; that the floats are equal is checked first. Times are
processor time, median [least … most].
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import in_turn, parser_of, print_machine

from lumrec.batches.rows import RowBuilder
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.experiments.config import load
from lumrec.features.history import UserHistory
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.features.statistics import LogPast, Statistics, dense_inputs, raw_columns
from lumrec.models.ranker import row_features
from lumrec.modules.rankers.base import RankBatch
from lumrec.serving.keys import Keys, write_keys
from lumrec.serving.requests import Event, RequestBuilder, RequestSpec, ScoreRequest
from lumrec.stages.registry import STAGES

READS = ("age_T", "category_count_T")
AT_ONCE = 32


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--events", type=int, nargs="+", default=[50, 1024, 4096])
    parser.add_argument("--users", type=int, default=2000, help="of the simulated log")
    parser.add_argument("--kind", default="all", choices=["all", "user", "none"], help="of statistics")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_machine(args)
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder), args.users)
        print(f"{data.num_events:,} events, {data.num_items:,} items, {len(data.schema.features)} features\n")
        for num_events in args.events:
            measure(data, Path(folder), num_events, args)


def prepared(folder: Path, num_users: int) -> PreparedData:
    """A simulated log of ten times as many items."""
    words = ["name=log", f"runs_dir={folder}", "data.source=simulator", "data.simulator.events_per_user=50"]
    words += [f"data.simulator.num_users={num_users}", f"data.simulator.num_items={10 * num_users}"]
    STAGES["prepare"].run(load(None, words))
    return PreparedData.open(folder / "log-prepare")


def measure(data: PreparedData, folder: Path, num_events: int, args: argparse.Namespace) -> None:
    """Prints the times for users with this many events."""
    random, items, model = np.random.default_rng(0), data.item_keys(), dense_inputs(data, kind=args.kind).model
    of_row = row_features(data.schema)
    features = [*features_by_role(data.schema, "item"), *features_by_role(data.schema, "feedback"), *of_row]
    settings = {"features": features, "row_features": of_row, "max_history": num_events, "reads": READS}
    keys_folder = folder / f"keys-{num_events}"
    keys_folder.mkdir()
    write_keys(keys_folder, {table: data.vocabulary(table) for table in data.table_rows}, items)
    builder = RequestBuilder(
        RequestSpec.of(data, model, **settings),
        Keys(keys_folder, data.table_rows, num_items=data.num_items),
        Catalogue.of(data),
        ItemHistory.of(data) if args.kind == "all" else None,
    )
    layout = builder.spec.layout(keep=max(num_events, 50))
    now = int(data.timestamp.max()) + 60
    item_E = random.integers(0, data.num_items, num_events)
    history = UserHistory.empty(layout)
    events = [
        Event("new", items[item], now - 60 * (num_events - n), float(random.random() < 0.3), {"clicked": "like"})
        for n, item in enumerate(item_E.tolist())
    ]
    history.append(builder.encode(events), builder.known(layout))
    item_C = random.integers(0, data.num_items, args.candidates)
    request, stored = ScoreRequest("new", [items[item] for item in item_C.tolist()], time=now), history.to_bytes()
    one = builder.batch([request], [history]).rank
    check_equal(one.expanded(), plain(data, builder, history, item_C, now))
    times = in_turn(
        {
            "read": lambda: UserHistory.from_bytes(stored, layout),
            "batch": lambda: builder.batch([request], [history]),
            f"batch of {AT_ONCE}": lambda: builder.batch([request] * AT_ONCE, [history] * AT_ONCE),
            "plain": lambda: plain(data, builder, history, item_C, now),
        },
        repeats=args.repeats,
    )
    print(f"{num_events:,} events × {args.candidates} candidates; state of {len(stored):,} bytes; ms of one request")
    for name, each in times.items():
        share = 1000 / (AT_ONCE if "of" in name else 1)
        least, most = (share * of(each.cpu_s) for of in (min, max))
        print(f"  {name:12} {share * each.cpu:7.3f} [{least:.3f} … {most:.3f}]")
    print()


def plain(
    data: PreparedData,
    builder: RequestBuilder,
    history: UserHistory,
    item_C: np.ndarray,
    now: int,
) -> RankBatch:
    """The batch by the code of training, on a log of this user, of whom the last event is the request."""
    log, spec = copy.copy(data), builder.spec
    num = len(history.events) + 1
    log.num_users, log.num_events, log.num_rows = 1, num, num + len(item_C)
    log.user, log.user_offsets = np.zeros(num, np.int64), np.array([0, num])
    log.item = np.append(history.events.item, item_C[0])
    log.timestamp = np.append(history.events.time // 1_000_000, now)
    log.before = np.searchsorted(log.timestamp, log.timestamp)
    log.label = np.append(history.events.label, 0).astype(np.float32)
    log.negative_event, log.negative_item = np.full(len(item_C), num - 1), item_C
    log.event_columns = {}
    for name in (*features_by_role(spec.schema, "feedback"), *spec.row_features):
        if name in data.event_columns:
            rows_V, offsets = history.events.features[name]
            if offsets is None:
                log.event_columns[name] = Column(torch.cat([rows_V, torch.zeros(1, dtype=torch.int64)]))
            else:
                log.event_columns[name] = Column(rows_V, torch.cat([offsets, offsets[-1:]]))
    log.user_columns = {name: history.users[name] for name in data.user_columns}
    rows, rates = log.rows(np.arange(log.num_rows)), None
    values = {"label": log.label.astype(np.float64)}
    if builder.items is not None:
        rates = builder.items.rates(rows.item, log.timestamp[log.before[rows.event]], spec.statistics.base_rate)
        values["excess"] = values["label"] - rates[0][:num]
    past, model = LogPast(log, rows, values, slice(0, log.num_events)), spec.statistics
    raw = raw_columns(past, model.kind, model.base_rate, model.features, rates)
    dense_RF = np.zeros((log.num_rows, len(model.names)), np.float32)
    dense_RF[:, : len(raw)] = model.standardised(raw, log.num_rows)
    for f, name in enumerate(model.dense, len(raw)):
        if data.schema.features[name].role == "item":
            dense_RF[:, f] = data.dense[name][rows.item]
    settings: dict[str, Any] = {
        "features": spec.features,
        "row_features": spec.row_features,
        "max_history": spec.max_history,
        "reads": spec.reads,
    }
    maker = RowBuilder(log, statistics=Statistics(dense_RF, model.names), **settings)
    return maker.batch(np.arange(num, log.num_rows))


def check_equal(one: RankBatch, other: RankBatch) -> None:
    """Raises AssertionError where floats or lengths of the two batches differ."""
    torch.testing.assert_close(one.dense_BF, other.dense_BF, rtol=1e-6, atol=1e-6)
    for name in ("offsets_B1", *READS):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=name)


if __name__ == "__main__":
    main()
