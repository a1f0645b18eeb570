"""Step 3's hot path: rows/s of training each ranker; DIN and DLRM beside plain padded PyTorch twins of their size.

    python benchmarks/rank.py [--models din,dlrm,dien,sim,twin] [--widths 16,32] [--history 50] [--batch 4096]
                              [--threads 2] [--repeats 7]

With --candidates: the time to score so many rows of one user instead, batch put together and scored, in milliseconds.

A repeat is one batch: put together from the log, forward, backward, optimizer step. The twin is what one writes first:
nn.Embedding for each feature, histories padded to the longest, [h; t; h*t; h-t] through nn.Linear, Adam for everything.
Both read the same rows of a simulated log (three item features, one of them a list, and the feedback given; 6 features
of the row), in turn, so that both feel the same machine. The ratio within one run is what counts; machines differ.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torchrec
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.config import load
from lumrec.data.columns import Column
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.statistics import Statistics, dense_inputs
from lumrec.train.optimizers import build_optimizer
from lumrec.train.parallel import init_distributed, shard
from lumrec.train.rank import MODELS, RankConfig, build_ranker, build_rows, row_features, step

WARM_UP = 3
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
        self.row_features = row_features(data)
        self.item = {name: padded(data.item_columns[name]) for name in ITEM}
        self.event = {name: padded(column) for name, column in data.event_columns.items()}
        self.user = {name: padded(column) for name, column in data.user_columns.items()}
        self.dense = torch.from_numpy(statistics.values_EF)
        self.tables = nn.ModuleDict({name: nn.Embedding(n, width) for name, n in data.table_rows.items()})
        token, item = width * (len(ITEM) + len(FEEDBACK)), width * len(ITEM)
        self.unit = nn.Sequential(
            nn.Linear(4 * token, config.activation_dim), nn.PReLU(), nn.Linear(config.activation_dim, 1)
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


def make_ours(data: PreparedData, config: RankConfig, statistics: Statistics) -> Callable[[np.ndarray], None]:
    ranker = build_ranker(config, data, num_statistics=len(statistics.names))
    builder = build_rows(ranker, data, config, statistics)
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


def rows_per_s(runs: list[Callable[[np.ndarray], None]], batches: list[np.ndarray], repeats: int) -> list[list[float]]:
    """Sorted rows/s of each of the `runs`, which take turns at the same batches."""
    speeds: list[list[float]] = [[] for _ in runs]
    for repeat in range(WARM_UP + repeats):
        rows = batches[repeat % len(batches)]
        for one, speed in zip(runs, speeds, strict=True):
            start = time.perf_counter()
            one(rows)
            if repeat >= WARM_UP:
                speed.append(len(rows) / (time.perf_counter() - start))
    return [sorted(speed) for speed in speeds]


def scoring_ms(
    data: PreparedData, config: RankConfig, statistics: Statistics, candidates: int, repeats: int
) -> list[float]:
    """Sorted milliseconds of putting together and scoring rows of one user, whose histories are about equally long."""
    ranker = build_ranker(config, data, num_statistics=len(statistics.names)).eval()
    builder = build_rows(ranker, data, config, statistics)
    last = int(data.user_offsets[1:][np.argmax(np.diff(data.user_offsets))])
    rows, times = np.resize(np.arange(max(0, last - candidates), last), candidates), []
    with torch.no_grad():
        for repeat in range(WARM_UP + repeats):
            start = time.perf_counter()
            ranker(builder.batch(rows))
            if repeat >= WARM_UP:
                times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def shown(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):8,.0f} [{speeds[0]:,.0f} … {speeds[-1]:,.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--candidates", type=int, default=0)
    parser.add_argument("--widths", default="16,32")
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    init_distributed("cpu", threads=args.threads)
    versions = f"torch {torch.__version__}, torchrec {torchrec.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}, float32")
    what = f"scoring {args.candidates} rows of one user" if args.candidates else f"training, batch {args.batch}, rows/s"
    print(f"{what}, history {args.history}; median [least … most] of {args.repeats} repeats")
    print(f"{'model':5} {'width':>5}  {'lumrec':>28}  {'padded twin':>28}  ratio")
    with tempfile.TemporaryDirectory() as runs:
        for width in map(int, args.widths.split(",")):
            data = simulated_log(runs, width, args.history)
            statistics_EF = dense_inputs(data)
            rows = np.random.default_rng(0).permutation(np.flatnonzero(data.split == 0))
            batches = [rows[i * args.batch : (i + 1) * args.batch] for i in range(5)]
            for model in args.models.split(","):
                torch.manual_seed(0)
                config = RankConfig(model=model, batch_size=args.batch, max_history=args.history)
                if args.candidates:
                    milliseconds = scoring_ms(data, config, statistics_EF, args.candidates, args.repeats)
                    print(f"{model:5} {width:>5}  {shown(milliseconds):>28} ms", flush=True)
                    continue
                runs_of = [make_ours(data, config, statistics_EF)]
                if model in TWINS:
                    runs_of.append(make_twin(data, config, width, statistics_EF))
                fast, *plain = rows_per_s(runs_of, batches, args.repeats)
                beside = [f"{shown(p):>28}  {statistics.median(fast) / statistics.median(p):.2f}" for p in plain]
                print(f"{model:5} {width:>5}  {shown(fast):>28}  {''.join(beside)}", flush=True)


if __name__ == "__main__":
    main()
