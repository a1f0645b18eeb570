"""Plans the pre-training of a LUM on a cluster, without data or a GPU: memory of each rank, time, and what limits it.

TorchRec's planner places the tables, on a topology of the GPUs that are named, or as pretrain.train.sharding says.
FLOPs and activations come from the model itself (lumrec/train/footprint.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torchrec.distributed.planner.types import PlannerError

from lumrec.data.common import Common
from lumrec.data.manifest import read_manifest
from lumrec.data.prepare import schema_to_read
from lumrec.data.schema import EVENT_ROLES, features_by_role
from lumrec.knowledge.records import user_dtype
from lumrec.models.lum import ModelConfig, lum_tables, make_lum, token_features
from lumrec.modules.large_user_model import LargeUserModel
from lumrec.modules.tokens import make_tables
from lumrec.run.errors import UserError
from lumrec.run.files import write_atomically
from lumrec.run.folder import RunFolder, check_made_by, clear
from lumrec.run.limits import check_names, count, setting, share
from lumrec.run.printable import say, text_table
from lumrec.stages.pretrain import PRECISIONS, PretrainConfig
from lumrec.stages.query import QueryConfig
from lumrec.train.footprint import FLOAT, TRAINED_BYTES, StepCost, dense_elements, step_cost, table_elements
from lumrec.train.hardware import GPUS, Cluster, this_cpu
from lumrec.train.plan import Planned, make_plan, plan_json, read_sharding

GIB = 2**30
GROUPS_SHOWN = 8


@dataclass(frozen=True)
class PlanConfig:
    """The cluster and the log that a pre-training is planned for.

    nodes: machines.
    gpus: GPUs of each machine, with one process each; for cpu, its processes.
    gpu: the GPU; cpu plans for processes on this machine's CPU, whose speed is measured.
    users, events, items: size of the log, all of whose events train; 0 = as in the prepared data.
    rows: rows of a table by its name; otherwise as in the prepared data. The table of the schema's first item feature
        has as many rows as there are items.
    list_values: mean number of values of a multi-valued feature.
    network_gbit: network of each GPU to other machines, one way, in Gbit/s.
    host_memory_gib: memory of each machine.
    entity_bytes: memory that a user and an item take in each process (keys, offsets, windows, popularity).
    efficiency: share of the GPU's peak that matrix products reach, an assumption.
    reserve: share of the memory that is left to CUDA, NCCL and fragmentation, an assumption.
    json: print the result as JSON instead of tables.
    """

    nodes: int = count(1, least=1, most=1024)
    gpus: int = count(8, least=1, most=64)
    gpu: Literal["a100-40g", "a100-80g", "h100", "h200", "b200", "l40s", "cpu"] = "h100"
    users: int = count(0)
    events: int = count(0)
    items: int = count(0)
    rows: dict[str, int] = setting(dict, least=1, most=2**40)
    list_values: float = setting(2.0, above=0, most=10_000)
    network_gbit: float = setting(400.0, above=0, most=1e6)
    host_memory_gib: float = setting(2048.0, above=0, most=1e6)
    entity_bytes: float = setting(100.0, least=0, most=1e6)
    efficiency: float = setting(0.5, above=0, most=1)
    reserve: float = share(0.1)
    json: bool = False


class Training:
    """A LUM on the meta device, how it is trained, on what and where.

    Raises UserError for sizes of the log that neither the settings nor prepared data give, and for unknown tables.
    """

    def __init__(self, common: Common, model: ModelConfig, pretrain: PretrainConfig, settings: PlanConfig) -> None:
        self.model, self.pretrain, self.settings, self.train = model, pretrain, settings, pretrain.train
        self.schema = schema = schema_to_read(common)
        self._read_log(common)
        hardware = this_cpu() if settings.gpu == "cpu" else GPUS[settings.gpu]
        host_memory = settings.host_memory_gib * GIB
        self.cluster = Cluster(hardware, settings.nodes, settings.gpus, settings.network_gbit / 8, host_memory)
        self.low = pretrain.precision != "float32"
        self.peak = 1e12 * (hardware.bf16 if self.low else hardware.fp32)
        features = {
            name: schema.features[name].table for both in token_features(model, schema).values() for name in both
        }
        self.tables = make_tables(self.sizes, features, device="meta")
        with torch.device("meta"):
            self.lum = make_lum(model, schema, self.tables)
        self.encoder, self.others = dense_elements(self.lum)
        self.held = sum(dense_elements(self.lum, shards=self.cluster.ranks if self.train.fsdp else 1))
        negatives = pretrain.negatives
        self.events = pretrain.packing.events_per_pack  # of a rank's step, like all that follows
        self.candidates = self.items if negatives.full else min(self.items, self.events + negatives.sampled)
        self.compared = self.candidates if negatives.full or negatives.in_batch else negatives.sampled
        self.across = self.cluster.ranks if negatives.across_ranks else 1

    def _read_log(self, common: Common) -> None:
        settings, widths = self.settings, lum_tables(self.model, self.schema)
        check_names("plan.rows", list(settings.rows), list(widths), "tables that this LUM reads")
        manifest = read_manifest(common.prepared, verify=False) if common.prepared.exists() else {}
        counts, rows = manifest.get("counts", {}), manifest.get("table_rows", {})
        given = {"users": settings.users, "events": settings.events, "items": settings.items}
        self.users, self.events_held, self.items = (size or counts.get(name, 0) for name, size in given.items())
        self.train_events = settings.events or counts.get("train_events", 0)
        if settings.items:
            rows = rows | {self.schema.features[features_by_role(self.schema, "item")[0]].table: settings.items + 1}
        rows = rows | settings.rows
        missing = [f"plan.{name}" for name, size in given.items() if not (size or counts)]
        missing += [f"plan.rows.{name}" for name in widths if name not in rows]
        if missing:
            raise UserError(
                f"there are no prepared data in {common.prepared} to read {', '.join(missing)} from: give them, such "
                f"as {missing[0]}=100000, or prepare the data (apps/prepare.py)"
            )
        self.sizes = {name: (int(rows[name]), width) for name, width in widths.items()}

    @cached_property
    def cost(self) -> StepCost:
        """FLOPs and activations of the forward pass, if all users have equally many events."""
        window = max(1, min(self.model.max_events, round(self.events_held / self.users)))

        def make(num_layers: int, checkpointed: bool) -> LargeUserModel:
            model = dataclasses.replace(
                self.model, num_layers=num_layers, checkpoint_activations=checkpointed, compile=False
            )
            return make_lum(model, self.schema, self.tables)

        return step_cost(
            make,
            num_layers=self.model.num_layers,
            checkpointed=self.model.checkpoint_activations,
            histories=self.events / window,
            events=window,
            candidates=self.candidates,
            queries=bool(self.pretrain.contrast.feature),
            dtype=PRECISIONS[self.pretrain.precision],
        )

    def place_tables(self, memory: float) -> Planned:
        """The tables' plan where each rank has `memory` bytes for them; if they do not fit, one for more memory."""
        chosen = read_sharding(self.train.sharding, self.lum, world_size=self.cluster.ranks)
        multi = [name for name, feature in self.schema.features.items() if feature.kind == "multi"]
        values = dict.fromkeys(multi, self.settings.list_values)
        bags = self.events * (2 if self.pretrain.contrast.feature else 1) + self.candidates
        try:
            return make_plan(self.lum, chosen, self.cluster.topology(memory), bags=bags, values_per_bag=values)
        except PlannerError:
            return make_plan(self.lum, chosen, self.cluster.topology(2**60), bags=bags, values_per_bag=values)

    def table_memory(self, tables: Planned) -> list[tuple[int, int]]:
        """For each rank, bytes of its tables and of their optimizer's state."""
        optimizer, ranks = self.train.optimizer.table_optimizer, self.cluster.ranks
        elements = table_elements(tables.plan, self.sizes, optimizer=optimizer, ranks=ranks)
        return [(FLOAT * weights, FLOAT * state) for weights, state in elements]

    def dense_memory(self) -> dict[str, float]:
        """Bytes of each rank, without its tables, by what takes them."""
        block = sum(parameter.numel() for parameter in self.lum.user_encoder.blocks[0].parameters())
        # FSDP holds two whole blocks and two gradients of one: of the block at hand, and of the one on its way.
        working: float = 4 * FLOAT * block * self.train.fsdp
        if self.model.checkpoint_activations:
            # The forward pass ends with autocast's casts of all weights; the backward pass has one block's activations.
            working += max(2 * block * self.model.num_layers * self.low, self.cost.block_kept)
        return {
            "encoder": TRAINED_BYTES * (self.held - self.others),
            "other dense": TRAINED_BYTES * self.others,
            # InfoNCE keeps the gradients of outputs and candidates.
            "activations": self.cost.kept + FLOAT * self.model.dim * 2 * (self.events + self.candidates * self.across),
            "working": working,
            "reserve": self.settings.reserve * self.cluster.memory,
        }

    def work(self) -> dict[str, float]:
        """FLOPs (as flops.py counts them) and bytes of a rank's step, without its tables."""
        # Gradients take twice the products of the forward pass. InfoNCE has three products, all in its forward pass.
        flops = 3 * self.cost.flops + 6 * self.events * self.compared * self.across * self.model.dim
        passes = (3 if self.train.fsdp else 2) * self.encoder + 2 * self.others  # gather, gather, reduce; or all-reduce
        return {
            "flops": flops,
            "recomputed_flops": self.model.num_layers * self.cost.block_flops * self.model.checkpoint_activations,
            "memory_bytes": 3 * FLOAT * (self.encoder + self.others) + 2 * self.cost.kept,
            "network_bytes": FLOAT * passes * (self.cluster.ranks > 1),
        }

    def seconds(self, work: dict[str, float], tables: Planned) -> dict[str, float]:
        """Seconds of a step by what takes them, and in all: the first three overlap, the last two with nothing."""
        bandwidth = 1e9 * self.cluster.hardware.bandwidth
        overlapping = {
            "products": (work["flops"] + work["recomputed_flops"]) / (self.settings.efficiency * self.peak),
            "network": self.cluster.gather_s(work["network_bytes"]),
            "bandwidth": work["memory_bytes"] / bandwidth,
        }
        # AdamW reads weight, gradient and two moments, and writes all but the gradient.
        others = {"tables": max(tables.rank_s), "optimizer": 7 * FLOAT * self.held / bandwidth}
        return overlapping | others | {"step": max(overlapping.values()) + sum(others.values())}

    def log_bytes(self) -> float:
        """Bytes of the mapped events (lumrec/data/mapped.py)."""
        event: float = 5 * 8 + 4 + 1  # user, item, time, order, moment; label; split
        for role in EVENT_ROLES:
            for name in features_by_role(self.schema, role):
                event += 8 + 8 * self.settings.list_values * (self.schema.features[name].kind == "multi")
            event += FLOAT * len(features_by_role(self.schema, role, dense=True))
        return event * self.events_held

    def too_large(self, fullest: dict[str, float], data: float, host: float) -> list[str]:
        """What does not fit, each with what to change; empty if all fits. data: bytes of the events of the log."""
        limit, host_limit, found = self.cluster.memory, self.cluster.host_memory, []
        if (total := sum(fullest.values())) > limit:
            of_tables = fullest["tables"] + fullest["state"]
            # Tables can be spread further, unless the rest is too large without them. The last part is the reserve.
            parts = list(fullest)[2 if total - of_tables > limit else 0 : -1]
            largest = max(parts, key=lambda part: fullest[part])
            change = {
                "tables": "narrow them (schema.tables.<name>.width) or take more ranks",
                "state": "set pretrain.train.optimizer.table_optimizer=rowwise_adagrad",
                "activations": "lower pretrain.packing.events_per_pack",
                "working": "lower pretrain.packing.events_per_pack",
            }.get(largest, "take more ranks")
            if self.candidates > self.events + self.pretrain.negatives.sampled:
                change = "set pretrain.negatives.full=false, as each step embeds the whole catalogue"
            elif largest == "activations" and not self.model.checkpoint_activations:
                change = "set model.checkpoint_activations=true"
            elif largest == "encoder" and not self.train.fsdp and self.cluster.ranks > 1:
                change = "set pretrain.train.fsdp=true"
            size = _gib(fullest[largest])
            found.append(f"a rank takes {_gib(total)} of {_gib(limit)} GiB, {largest} {size} of them: {change}")
        if host > host_limit:
            change = "" if data > host_limit else "; fewer processes of each machine (gpus) take less"
            found.append(
                f"a machine takes {_gib(host)} of {_gib(host_limit)} GiB, {_gib(data)} of them the events of the log, "
                f"which are read in random order{change}"
            )
        return found


def run(
    common: Common, model: ModelConfig, pretrain: PretrainConfig, query: QueryConfig, settings: PlanConfig
) -> dict[str, float | str]:
    """Prints the plan and returns it, as result.json holds it; the sharding is in plan.json beside it.

    Keys: fits ("yes", or what does not), ranks, parameters (of the encoder), "gib/<part>" (of the fullest rank; "rank"
    in all, "machine", "store" of step 2 on disk), work of a rank's step (flops, recomputed_flops, memory_bytes,
    network_bytes), "s/<part>" (its seconds; "step" in all), mfu (at most), limited_by, steps (of an epoch), days (of
    all epochs). Raises UserError like `Training`, and for a sharding that does not fit.
    """
    recorded = common.settings(model=model, pretrain=pretrain, query=query, plan=settings)
    training = Training(common, model, pretrain, settings)
    cluster, dense, work = training.cluster, training.dense_memory(), training.work()
    tables = training.place_tables(cluster.memory - sum(dense.values()))
    ranks = [{"tables": weights, "state": state, **dense} for weights, state in training.table_memory(tables)]
    fullest = max(ranks, key=lambda parts: sum(parts.values()))
    seconds = training.seconds(work, tables)
    data, of_each = training.log_bytes(), settings.entity_bytes * (training.users + training.items)
    host = data + cluster.gpus * (of_each + (0 if cluster.hardware.memory else sum(fullest.values())))
    answer = user_dtype(max(1, len(query.conditions)), model.dim, query.dtype, with_log_z=query.log_normalizer).itemsize
    gib = {
        **fullest,
        "rank": sum(fullest.values()),
        "machine": host,
        "store": answer * (training.users * query.users + training.events_held * query.rows),
    }
    steps = math.ceil(training.train_events * pretrain.time_share / (training.events * cluster.ranks))
    found = training.too_large(fullest, data, host)
    result: dict[str, float | str] = {
        "fits": f"no: {'; '.join(found)}" if found else "yes",
        "ranks": cluster.ranks,
        "parameters": training.encoder,
        **{f"gib/{part}": num_bytes / GIB for part, num_bytes in gib.items()},
        **work,
        **{f"s/{part}": value for part, value in seconds.items()},
        "mfu": work["flops"] / (seconds["step"] * training.peak),
        "limited_by": max(list(seconds)[:-1], key=lambda part: seconds[part]),
        "steps": steps,
        "days": steps * training.train.epochs * seconds["step"] / 86_400,
    }
    folder = common.folder("plan")
    if folder.exists():  # a plan takes seconds: it is made again, whatever its config was
        check_made_by(folder, "plan")
        with contextlib.closing(RunFolder.locked(folder)):
            clear(folder)
    run_folder = RunFolder.create(folder, "plan", recorded)
    write_atomically(folder / "plan.json", plan_json(tables.plan))
    run_folder.finish(result)
    say(json.dumps(result, indent=2) if settings.json else text(training, tables, ranks, result))
    return result


def text(training: Training, tables: Planned, ranks: list[dict[str, float]], result: dict[str, Any]) -> str:
    """A plan for the terminal: tables, memory of each rank (equal ones as one line), work and time of a step."""
    cluster, model, settings = training.cluster, training.model, training.settings
    placed = [["table", "rows", "width", "GiB", "sharding", "ranks"]]
    for module in tables.plan.plan.values():
        for name, sharding in module.items():  # type: ignore[attr-defined]
            (rows, width), on = training.sizes[name], sharding.ranks
            where = f"{min(on)} to {max(on)}" if len(on) > 1 else str(on[0])
            size = f"{FLOAT * rows * width / GIB:.3f}"
            placed.append([name, f"{rows:,}", str(width), size, sharding.sharding_type, where])
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, parts in enumerate(ranks):
        alike.setdefault(tuple(map(_gib, (*parts.values(), sum(parts.values()), cluster.memory))), []).append(rank)
    shown = sorted(alike.items(), key=lambda group: -sum(ranks[group[1][0]].values()))[:GROUPS_SHOWN]
    memory = [["ranks", "first", *ranks[0], "all", "limit"]]
    memory += [[str(len(found)), str(found[0]), *cells] for cells, found in shown]
    of_step = [name for name in result if name.startswith("s/")]
    how = "FSDP" if training.train.fsdp else "replicated"
    return "\n".join(
        [
            f"{model.encoder} of {training.encoder:,} parameters, {training.pretrain.precision}, {how}, on "
            f"{cluster.nodes} x {cluster.gpus} {settings.gpu}",
            f"{training.users:,} users, {training.events_held:,} events, {training.items:,} items",
            *("", *text_table(placed)),
            *("", "memory of each rank in GiB, the fullest first", *text_table(memory)),
            f"each machine: {result['gib/machine']:,.0f} of {settings.host_memory_gib:,.0f} GiB of host memory; "
            f"step 2's answers on disk: {result['gib/store']:,.0f} GiB",
            *("", f"a step of {training.events:,} events a rank"),
            f"FLOP {result['flops']:.3g}, computed again {result['recomputed_flops']:.3g}; GiB of memory traffic "
            f"{_gib(result['memory_bytes'])}, of dense parameters over the network {_gib(result['network_bytes'])}",
            *text_table([["seconds", *(name[2:] for name in of_step)], ["", *(f"{result[n]:.4f}" for n in of_step)]]),
            f"assumed: products reach {settings.efficiency:.0%} of {training.peak / 1e12:,.0f} TFLOP/s; products, "
            "network and bandwidth overlap, tables and optimizer with nothing",
            f"limited by {result['limited_by']}; MFU at most {result['mfu']:.1%}; {result['steps']:,} steps an epoch, "
            f"{result['days']:,.2f} days for {training.train.epochs} epochs",
            f"fits: {result['fits']}",
        ]
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"
