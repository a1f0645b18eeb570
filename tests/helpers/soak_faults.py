"""What tests/soak.py does to a server: each does it, waits until it is seen, undoes it, and says what was seen.

They raise AssertionError where it is not seen, or not over afterwards. soak: the Soak of that file.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import schemathesis
from malformed import send_malformed

from lumrec.experiments.config import load
from lumrec.knowledge import manifest as knowledge
from lumrec.run.files import write_atomically
from lumrec.run.listed_files import own_hash
from lumrec.serving import bundle
from lumrec.stages.registry import STAGES

RELOADS, MALFORMED, SEEN_WITHIN_S = 100, 1000, 90.0
READABLE_STATE, READABLE_STORE = (f'lumrec_readable{{what="{what}"}}' for what in ("state", "store"))


async def kill_a_worker(soak: Any) -> str:
    killed, starts = soak.workers()[0], await soak.metric("lumrec_starts_total")
    soak.kills.append(time.perf_counter())
    os.kill(killed, signal.SIGKILL)
    return await soak.seen("lumrec_starts_total", lambda n: n == starts + 1, f"worker {killed} has ended.*SIGKILL")


async def kill_redis(soak: Any) -> str:
    soak.redis.kill()
    gone = await soak.seen(READABLE_STATE, lambda n: n == 0, "the state cannot be read: .*not answer")
    soak.redis.start()
    return f"{gone}; {await soak.seen(READABLE_STATE, bool, 'serving the state')}"


async def stop_redis(soak: Any) -> str:
    soak.redis.process.send_signal(signal.SIGSTOP)
    try:
        hangs = await soak.seen(READABLE_STATE, lambda n: n == 0, "the state cannot be read: .*Timeout")
        await asyncio.sleep(10)
    finally:
        soak.redis.process.send_signal(signal.SIGCONT)
    return f"{hangs}; {await soak.seen(READABLE_STATE, bool, 'serving the state')}"


async def empty_redis(soak: Any) -> str:
    soak.redis.kill()
    shutil.rmtree(soak.redis.socket.parent / "appendonlydir")
    soak.redis.start()
    empty = await soak.seen(READABLE_STATE, lambda n: n == 0, "the state cannot be read: there is no user state")
    config = load(None, [*soak.words, "overwrite=true"])
    await asyncio.to_thread(STAGES["user_state"].run, config)
    return f"{empty}; {await soak.seen(READABLE_STATE, bool, 'serving the state')}"


async def take_the_store_away(soak: Any) -> str:
    away = soak.store.with_name("away")
    soak.store.rename(away)
    try:
        gone = await soak.seen(READABLE_STORE, lambda n: n == 0, "the store cannot be read: there is nothing")
    finally:
        away.rename(soak.store)
    return f"{gone}; {await soak.seen(READABLE_STORE, bool, 'serving the store')}"


async def cut_the_store(soak: Any) -> str:
    file = next(soak.store.glob(f"knowledge-*/{knowledge.USERS_FILE}"))
    copy = file.with_name("copy")
    shutil.copyfile(file, copy)
    soak.kills += [time.perf_counter() + after for after in range(int(SEEN_WITHIN_S))]  # when each dies is not known
    os.truncate(file, 4096)
    try:
        died = await soak.seen(READABLE_STORE, lambda n: n == 0, "worker .* has ended.*SIGBUS")
        died += "; " + await soak.seen(READABLE_STORE, lambda n: n == 0, "the store cannot be read: .*was cut off")
    finally:
        copy.replace(file)
    return f"{died}; {await soak.seen(READABLE_STORE, bool, 'serving the store')}"


async def reload(soak: Any) -> str:
    for number in range(RELOADS):
        what = ("bundle", "store")[number % 2]
        metric = f'lumrec_reloads_total{{outcome="opened",what="{what}"}}'
        before = await soak.metric(metric)
        await asyncio.to_thread(new_bundle if what == "bundle" else new_store, soak.runs)
        await soak.seen(metric, lambda n: n >= before + 2, f"serving the {what}")  # noqa: B023
    return f"{RELOADS} new versions were served"


async def send_what_is_malformed(soak: Any) -> str:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{soak.port}/openapi.json")
    statuses = await asyncio.to_thread(send_malformed, schema, MALFORMED)
    return f"{sum(statuses.values())} malformed requests: {dict(sorted(statuses.items()))}"


FAULTS = {
    "kill -9 of a worker": kill_a_worker,
    "kill -9 of redis": kill_redis,
    "redis hangs": stop_redis,
    "redis comes back empty": empty_redis,
    "the store's disk is gone": take_the_store_away,
    "a file of the store is cut off": cut_the_store,
    "reloads": reload,
    "malformed requests": send_what_is_malformed,
}


def new_bundle(runs: Path) -> None:
    """Publishes a copy of the bundle as its next version."""
    path = runs / "bench-rank-bundle"
    manifest = bundle.read_manifest(path)
    with bundle.new_version(path) as folder:
        shutil.copytree(path / manifest["folder"], folder, dirs_exist_ok=True)
        rest = {name: value for name, value in manifest.items() if name not in ("format", "folder", "files", "sha256")}
        bundle.publish(path, folder, rest)


def new_store(runs: Path) -> None:
    """Publishes a copy of the knowledge as its next version."""
    path = runs / "bench-query"
    manifest = knowledge.read_manifest(path)
    old = path / manifest["folder"]
    manifest["folder"] = f"{old.name.rpartition('-')[0]}-{uuid.uuid4().hex[:12]}"
    shutil.copytree(old, path / manifest["folder"])
    manifest["sha256"] = own_hash(manifest)
    write_atomically(path / knowledge.MANIFEST, json.dumps(manifest))
    shutil.rmtree(old)
