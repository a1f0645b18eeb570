"""Fresh knowledge: events into the state of users, and the seconds until the LUM has answered them again.

    python benchmarks/fresh.py [--users 2000] [--width 64] [--layers 2] [--max-events 128] [--rate 20] [--seconds 20]

On one core, with a simulated log. `append` adds events of distinct users to the state, many or one at a time.
`answer` asks the LUM about users who each had one event since it last read them: from the keys and values that it has
kept (with the append of these events), and as the plain baseline from all of their events. `follow` appends events at a
steady rate while a follower in the same process answers them: seconds from the arrival of an event to the moment when
readers find the answer to it. LMDB always; a Redis with --redis redis://localhost:6379/0#benchmark, which is filled and
left as it is.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from _measure import in_turn, parser_of, print_machine

from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.features.history import histories_of
from lumrec.features.items import Catalogue
from lumrec.features.statistics import StatisticsModel, base_rate
from lumrec.knowledge.redis_load import load as load_into_redis
from lumrec.knowledge.store import KnowledgeStore
from lumrec.models.lum import load_lum
from lumrec.query.group_query import GroupQuery
from lumrec.serving.follow import Follower, spread
from lumrec.serving.keys import Keys, write_keys
from lumrec.serving.live_lum import LiveLum
from lumrec.serving.requests import Event, RequestBuilder, RequestSpec
from lumrec.serving.state import UserState, build
from lumrec.stages.registry import STAGES

AT_ONCE = 256


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-events", type=int, default=128)
    parser.add_argument("--rate", type=float, default=20, help="events a second of `follow`")
    parser.add_argument("--seconds", type=float, default=20, help="of `follow`")
    parser.add_argument("--redis", default="", help="redis://host:6379/0#name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_machine(args)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        data = trained(runs, args)
        measure("LMDB", data, runs, runs / "state", runs / "log-query", args)
        if args.redis:
            load_into_redis(runs / "log-query", args.redis)
            measure("Redis", data, runs, args.redis, args.redis, args)


def trained(runs: Path, args: argparse.Namespace) -> PreparedData:
    """The log, with a LUM after one step and its knowledge."""
    words = ["name=log", f"runs_dir={runs}", "data.source=simulator", "data.simulator.events_per_user=50"]
    words += [f"data.simulator.num_users={args.users}", f"data.simulator.num_items={args.users}"]
    words += [f"model.dim={args.width}", f"model.num_layers={args.layers}", f"model.max_events={args.max_events}"]
    words += ["pretrain.train.max_steps=1", "query.rows=false"]
    words += [f"pretrain.packing.events_per_pack={max(256, args.max_events)}"]
    for stage in ("prepare", "pretrain", "query"):
        STAGES[stage].run(load(None, words))
    return PreparedData.open(runs / "log-prepare")


def measure(
    name: str, data: PreparedData, runs: Path, place: str | Path, store: str | Path, args: argparse.Namespace
) -> None:
    """Prints what it takes with a state and a store at these places."""
    statistics = StatisticsModel("none", base_rate(data), [], {}, {})
    spec = RequestSpec.of(data, statistics, features=[], row_features=[], max_history=50)
    if not (runs / "keys").exists():
        write_keys(runs, {table: data.vocabulary(table) for table in data.table_rows}, data.item_keys())
    keys = Keys(runs, data.table_rows, num_items=data.num_items)
    builder = RequestBuilder(spec, keys, Catalogue.of(data), None)
    layout = spec.layout(keep=max(128, args.max_events))
    build(place, {}, layout, zip(data.user_keys(), histories_of(data, layout, builder.known(layout))))
    state, users, items = UserState.open(place, builder), data.user_keys(), data.item_keys()
    random, clock = np.random.default_rng(0), [int(data.timestamp.max())]

    def events(of: list[str]) -> list[Event]:
        clock[0] += 1
        places = random.integers(0, len(items), len(of))
        return [Event(user, items[i], clock[0], float(i % 2), {"scenario": "home"}) for user, i in zip(of, places)]

    some, one = users[:AT_ONCE], users[:1]
    appended = in_turn(
        {"many": lambda: state.append(events(some)), "one": lambda: state.append(events(one))}, repeats=args.repeats
    )
    print(f"{name}: append of {len(some)} events of as many users {1000 * appended['many'].cpu:.1f} ms", end="")
    print(f", of one event {1000 * appended['one'].cpu:.2f} ms")

    manifest = KnowledgeStore.open(store).manifest
    dmp, packs, _ = load_lum(runs / manifest["lums"][0]["run"], data, device="cpu")
    query = GroupQuery(dmp, packs, manifest["conditions"], **manifest["window"])
    kept, plain = LiveLum(query, layout, cache_bytes=2**30), LiveLum(query, layout, cache_bytes=0)
    short = [u for u, n in zip(users, np.diff(data.user_offsets).tolist()) if 0 < n < args.max_events // 2][:32]

    def ask(lum: LiveLum) -> None:
        lum.answer(short, state.get(short))  # type: ignore[arg-type]

    def ask_after_events() -> None:
        state.append(events(short))
        ask(kept)

    answered = in_turn({"kept": ask_after_events, "from the start": lambda: ask(plain)}, repeats=args.repeats)
    print(
        f"{name}: answer of {len(short)} users × {len(query.conditions)} conditions, one new event each, ms: ", end=""
    )
    print(", ".join(f"{how} {1000 * each.cpu:.1f}" for how, each in answered.items()))

    follower, stop, done = Follower(state, store, [kept], manifest["lums"]), threading.Event(), []
    follower.drain()
    thread = threading.Thread(target=lambda: done.append(follower.run(stop, idle_s=0.02)))
    thread.start()
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < args.seconds:
        state.append(events([users[int(random.integers(len(users)))]]))
        time.sleep(max(0.0, (passed * args.rate // 1 + 1) / args.rate - (time.perf_counter() - start)))
    time.sleep(0.5)
    stop.set()
    thread.join()
    seconds = done[0].seconds
    print(
        f"{name}: follow, {args.rate:g} events a second, {len(seconds)} answered; s to the answer: {spread(seconds)}\n"
    )


if __name__ == "__main__":
    main()
