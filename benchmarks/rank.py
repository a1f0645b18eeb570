"""Step 3's hot path: rows/s of training each ranker, without and with a LUM's knowledge (both kinds); DIN and DLRM
beside plain padded PyTorch twins of their size.

    python benchmarks/rank.py [--models din,dlrm,dien,sim,twin] [--widths 16,32] [--history 50] [--batch 4096]
                              [--threads 1] [--repeats 5]

With --candidates: the time to score so many rows of one user instead, batch put together and scored, in milliseconds,
and what it costs with knowledge.

A repeat is one batch: put together from the log, forward, backward, optimizer step. The twin is what one writes first:
nn.Embedding for each feature, histories padded to the longest, [h; t; h*t; h-t] through nn.Linear, Adam for everything.
All read the same rows of a simulated log (three item features, one of them a list, and the feedback given; 6 features
of the row), in turn, so that all feel the same machine. "+ knowledge" is the median over the repeats of a step with
knowledge by one without.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _measure import Times, in_turn, parser_of, print_machine
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.data.columns import Column
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.features.statistics import Statistics, dense_inputs
from lumrec.knowledge.store import Knowledge
from lumrec.models.ranker import build_ranker, build_rows, row_features
from lumrec.models.ranker_config import RANKERS
from lumrec.run.distributed import init_distributed
from lumrec.stages.rank import RankConfig, step
from lumrec.train.optimizers import build_optimizer
from lumrec.train.parallel import shard

TWINS = ("din", "dlrm")
ITEM, FEEDBACK = ("item_id", "categories", "price_bucket"), ("clicked",)


def simulated_log(runs: str, width: int, history: int) -> PreparedData:
    """A log whose tables all have the same width and whose rows mostly have a full history."""
    words = [
        "data.source=simulator",
        f"data.simulator.num_users={min(1000, 100_000 // history)}",
        f"data.simulator.events_per_user={4 * history}",
    ]
    words += ["data.simulator.num_items=4000", f"name=w{width}", f"runs_dir={runs}"]
    with contextlib.redirect_stdout(io.StringIO()):
        data = open_or_prepare(load(None, words))
    for table in data.schema.tables:
        data.schema.tables[table] = type(data.schema.tables[table])(width=width)
    return data


def padded(column: Column) -> Tensor:
    """Values of each entry in a row of one length, 0 where there is none."""
    if column.offsets is None:
        return column.values[:, None]
    lengths = column.offsets.diff()
    table = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    table[torch.arange(table.shape[1]) < lengths[:, None]] = column.values
    return table


class PaddedTwin(nn.Module):
    """DIN or DLRM the plain way: B rows, L places of history, values of a feature in the last dimension."""

    def __init__(self, model: str, data: PreparedData, config: RankConfig, width: int, statistics: Statistics) -> None:
        super().__init__()
        self.data, self.model, self.max_history = data, model, config.max_history
        self.row_features = row_features(data.schema)
        self.item = {name: padded(data.item_columns[name]) for name in ITEM}
        self.event = {name: padded(column) for name, column in data.event_columns.items()}
        self.user = {name: padded(column) for name, column in data.user_columns.items()}
        self.dense = torch.from_numpy(statistics.values_RF)
        self.tables = nn.ModuleDict({name: nn.Embedding(n, width) for name, n in data.table_rows.items()})
        token, item = width * (len(ITEM) + len(FEEDBACK)), width * len(ITEM)
        self.unit = nn.Sequential(
            nn.Linear(4 * token, config.din.activation_dim), nn.PReLU(), nn.Linear(config.din.activation_dim, 1)
        )
        in_dim = width * len(self.row_features) + item + token + item + (model == "dlrm") + self.dense.shape[1]
        layers: list[nn.Module] = []
        for hidden_dim in config.hidden_dims:
            layers += [nn.Linear(in_dim, hidden_dim), nn.PReLU(), nn.Dropout(config.dropout)]
            in_dim = hidden_dim
        self.over_arch = nn.Sequential(*layers, nn.Linear(in_dim, 1))

    def embed(self, name: str, values: Tensor) -> Tensor:
        """Mean over the last dimension's values that are not 0."""
        x = self.tables[self.data.schema.features[name].table](values)
        if values.shape[-1] == 1:
            return x.squeeze(-2)
        mask = (values > 0).unsqueeze(-1)
        return (x * mask).sum(-2) / mask.sum(-2).clamp(min=1)

    def forward(self, rows: np.ndarray) -> Tensor:
        data, index_B = self.data, torch.from_numpy(rows)
        place_BL = index_B[:, None] - torch.arange(self.max_history, 0, -1)
        mask_BL = place_BL >= torch.from_numpy(data.user_offsets[data.user[rows]])[:, None]
        event_BL = place_BL.clamp(min=0)
        items = torch.from_numpy(data.item)
        history = [self.embed(name, self.item[name][items[event_BL]]) for name in ITEM]
        history_BLD = torch.cat(
            [*history, *(self.embed(name, self.event[name][event_BL]) for name in FEEDBACK)], dim=-1
        )
        target_BI = torch.cat([self.embed(name, self.item[name][items[index_B]]) for name in ITEM], dim=-1)
        interest_BD = self.pool(history_BLD, F.pad(target_BI, (0, history_BLD.shape[2] - target_BI.shape[1])), mask_BL)
        users = torch.from_numpy(data.user[rows])
        x = [
            self.embed(name, self.user[name][users] if name in self.user else self.event[name][index_B])
            for name in self.row_features
        ]
        product_BI = interest_BD[:, : target_BI.shape[1]] * target_BI
        x += [target_BI, interest_BD, product_BI, self.dense[index_B]]
        if self.model == "dlrm":
            x.append(product_BI.sum(dim=1, keepdim=True))
        return self.over_arch(torch.cat(x, dim=1)).squeeze(1)

    def pool(self, history_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor) -> Tensor:
        if self.model == "dlrm":
            return (history_BLD * mask_BL[:, :, None]).sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        target_BLD = target_BD[:, None].expand_as(history_BLD)
        x = torch.cat([history_BLD, target_BLD, history_BLD * target_BLD, history_BLD - target_BLD], dim=-1)
        return ((self.unit(x).squeeze(2) * mask_BL)[:, :, None] * history_BLD).sum(1)


def make_ours(
    data: PreparedData, config: RankConfig, statistics: Statistics, knowledge: Knowledge | None = None
) -> Callable[[np.ndarray], None]:
    ranker = build_ranker(config, data, num_statistics=len(statistics.names), knowledge=knowledge)
    builder = build_rows(ranker, data, config, statistics, knowledge)
    dmp = shard(ranker, optimizer=config.train.optimizer, device="cpu")
    optimizer = build_optimizer(dmp, config.train.optimizer)

    def one(rows: np.ndarray) -> None:
        optimizer.zero_grad()
        (step(dmp, builder.batch(rows)).loss_sum / len(rows)).backward()
        nn.utils.clip_grad_norm_(optimizer.dense_parameters, config.train.optimizer.clip_grad_norm)
        optimizer.step()

    return one


def make_twin(
    data: PreparedData, config: RankConfig, width: int, statistics: Statistics
) -> Callable[[np.ndarray], None]:
    twin = PaddedTwin(config.model, data, config, width, statistics)
    optimizer = torch.optim.Adam(
        p for name, p in twin.named_parameters() if config.model == "din" or "unit" not in name
    )

    def one(rows: np.ndarray) -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(twin(rows), torch.from_numpy(data.label[rows])).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), config.train.optimizer.clip_grad_norm)
        optimizer.step()

    return one


def random_knowledge(folder: Path, data: PreparedData) -> Knowledge:
    """Random answers of two LUMs to two conditions, width 64, read from files as those of a query stage are."""
    rng, shape = np.random.default_rng(0), (data.num_events, 2, 64)
    folder.mkdir()
    np.save(folder / "items_e.npy", rng.standard_normal((2, data.num_items, 64), np.float32).astype(np.float16))
    np.save(folder / "user_fold.npy", rng.integers(0, 2, data.num_users).astype(np.int8))
    np.save(folder / "rows_o.npy", rng.standard_normal(shape, np.float32).astype(np.float16))
    np.save(folder / "rows_log_z.npy", rng.standard_normal(shape[:2], np.float32))
    np.save(folder / "rows_present.npy", rng.random(data.num_events) < 0.95)
    files = {path.name: {} for path in folder.iterdir()}
    manifest = {
        "conditions": [{"wish": "like"}, {"wish": "dislike"}],
        "hazard": "cross_fit",
        "dim": 64,
        "dtype": "float16",
        "lums": [{}, {}],
    }
    return Knowledge(folder, {**manifest, "files": files}, data.user)


def make_scoring(
    data: PreparedData, config: RankConfig, statistics: Statistics, candidates: int, knowledge: Knowledge | None = None
) -> Callable[[], object]:
    """Puts together and scores rows of one user, whose histories are about equally long."""
    ranker = build_ranker(config, data, num_statistics=len(statistics.names), knowledge=knowledge).eval()
    builder = build_rows(ranker, data, config, statistics, knowledge)
    last = int(data.user_offsets[1:][np.argmax(np.diff(data.user_offsets))])
    rows = np.resize(np.arange(max(0, last - candidates), last), candidates)
    return torch.no_grad()(lambda: ranker(builder.batch(rows)))


def cost_of_knowledge(times: dict[str, Times]) -> float:
    """Median over the turns of the processor time with knowledge by that without."""
    return statistics.median(k / b for k, b in zip(times["knowledge"].cpu_s, times["base"].cpu_s))


def training(args: argparse.Namespace, data: PreparedData, width: int, knowledge: Knowledge) -> None:
    """A line for each model: rows/s, of the padded twin too, and what knowledge costs."""
    facts, rows = dense_inputs(data), np.random.default_rng(0).permutation(np.flatnonzero(data.split == 0))
    for model in args.models.split(","):
        torch.manual_seed(0)
        config = RankConfig(model=model, batch_size=args.batch, max_history=args.history)
        steps = {
            "base": make_ours(data, config, facts),
            "knowledge": make_ours(data, dataclasses.replace(config, knowledge="both"), facts, knowledge),
        }
        if model in TWINS:
            steps["twin"] = make_twin(data, config, width, facts)
        batches = {
            name: itertools.cycle(rows[i * args.batch : (i + 1) * args.batch] for i in range(5)) for name in steps
        }
        turns = {
            name: partial(lambda step, cycle: step(next(cycle)), step, batches[name]) for name, step in steps.items()
        }
        times = in_turn(turns, repeats=args.repeats, warm_up=3)
        base, twin, cost = times["base"], times.get("twin"), cost_of_knowledge(times)
        beside = f"{args.batch / twin.cpu:8,.0f}  {twin.cpu / base.cpu:5.2f}" if twin else f"{'':15}"
        print(
            f"{model:5} {width:>5}  {args.batch / base.cpu:8,.0f}  {beside}  {cost:11.3f}  {base.shown()}", flush=True
        )


def scoring(args: argparse.Namespace, data: PreparedData, width: int, knowledge: Knowledge) -> None:
    """A line for each model: milliseconds of scoring the candidates, and what knowledge costs."""
    facts = dense_inputs(data)
    for model in args.models.split(","):
        torch.manual_seed(0)
        config = RankConfig(model=model, max_history=args.history)
        turns = {
            "base": make_scoring(data, config, facts, args.candidates),
            "knowledge": make_scoring(
                data, dataclasses.replace(config, knowledge="both"), facts, args.candidates, knowledge
            ),
        }
        times = in_turn(turns, repeats=args.repeats, warm_up=3)
        base, cost = times["base"], cost_of_knowledge(times)
        print(f"{model:5} {width:>5}  {1000 * base.cpu:8.2f}  {1000 * base.wall:8.2f}  {cost:11.3f}", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default=",".join(RANKERS))
    parser.add_argument("--candidates", type=int, default=0, help="score so many rows of one user instead of training")
    parser.add_argument("--widths", default="16,32")
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4096)
    args = parser.parse_args()
    init_distributed("cpu", threads=args.threads)
    print_machine(args)
    if args.candidates:
        print(f"scoring {args.candidates} rows of one user, history {args.history}; milliseconds")
        print(f"{'model':5} {'width':>5}  {'cpu':>8}  {'wall':>8}  + knowledge")
    else:
        print(f"training, batch {args.batch}, history {args.history}; rows/s by processor time")
        print(f"{'model':5} {'width':>5}  {'rows/s':>8}  {'twin':>8}  ratio  + knowledge  seconds a step")
    with tempfile.TemporaryDirectory() as runs:
        for width in map(int, args.widths.split(",")):
            data = simulated_log(runs, width, args.history)
            measure = scoring if args.candidates else training
            measure(args, data, width, random_knowledge(Path(runs) / f"knowledge-{width}", data))


if __name__ == "__main__":
    main()
