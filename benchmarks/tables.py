"""Embedding tables: an optimizer fused into the backward pass, beside plain ones over the same table.

    python benchmarks/tables.py [--rows 100000,1000000] [--tables 1] [--features 4] [--tokens 8192] [--width 64]

A repeat looks up `tokens` bags of one id for each of `features` features, which share `tables` tables of `rows` rows
each, sends a gradient back and updates the tables:

    lumrec        TorchRec's EmbeddingBagCollection under DistributedModelParallel, row-wise Adagrad fused in
    dense Adam    nn.Embedding, torch.optim.Adam: what one writes first; each step goes over all rows of a table and of
                  its two moments
    sparse Adam   nn.Embedding(sparse=True), torch.optim.SparseAdam: the rows that were met

Ids are uniform: as many rows are met as can be, which is where there is the least to gain. The ratio within one run is
what counts; machines differ.
"""

import argparse
from collections.abc import Callable

import torch
from _measure import in_turn, parser_of, print_machine
from torch import Tensor, nn

from lumrec.modules.tokens import make_kjt, make_tables
from lumrec.run.distributed import init_distributed
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard


def lumrec_step(id_FT: Tensor, grad_TX: Tensor, args: argparse.Namespace, rows: int) -> Callable[[], None]:
    table_of = {f"feature_{f}": f"table_{f * args.tables // args.features}" for f in range(args.features)}
    tables = make_tables({table: (rows, args.width) for table in table_of.values()}, table_of)
    features = list(table_of)
    model = shard(nn.ModuleDict({"tables": tables}), device="cpu", optimizer=OptimizerConfig())
    lookup = model.module.tables
    one_T = torch.ones(id_FT.shape[1], dtype=torch.int64)

    def step() -> None:
        columns = {feature: (id_T, one_T) for feature, id_T in zip(features, id_FT)}
        lookup(make_kjt(features, columns, stride=len(one_T))).wait().values().backward(grad_TX)

    return step


def plain_step(
    id_FT: Tensor, grad_TX: Tensor, args: argparse.Namespace, rows: int, *, sparse: bool
) -> Callable[[], None]:
    tables = nn.ModuleList(nn.Embedding(rows, args.width, sparse=sparse) for _ in range(args.tables))
    optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(tables.parameters())

    def step() -> None:
        optimizer.zero_grad()
        found = [tables[f * args.tables // args.features](id_T) for f, id_T in enumerate(id_FT)]
        torch.cat(found, dim=1).backward(grad_TX)
        optimizer.step()

    return step


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", default="100000,1000000", help="default 100000,1000000")
    parser.add_argument("--tables", type=int, default=1, help="default 1; at most one for each feature")
    parser.add_argument("--features", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    init_distributed("cpu", threads=args.threads)
    print_machine(args)
    print(f"{args.features} features × {args.tokens} tokens, {args.tables} table(s), width {args.width}, float32\n")
    print(f"{'rows':>10} {'':12} {'processor s':>26} {'wall s':>8} {'of lumrec':>10}")
    for rows in map(int, args.rows.split(",")):
        print_rows(rows, args)


def print_rows(rows: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    id_FT = torch.randint(1, rows, (args.features, args.tokens))
    inputs = id_FT, torch.randn(args.tokens, args.features * args.width), args, rows
    times = in_turn(
        {
            "lumrec": lumrec_step(*inputs),
            "dense Adam": plain_step(*inputs, sparse=False),
            "sparse Adam": plain_step(*inputs, sparse=True),
        },
        repeats=args.repeats,
    )
    for name, taken in times.items():
        ratio = taken.cpu / times["lumrec"].cpu
        print(f"{rows:10,} {name:12} {taken.shown(4):>26} {taken.wall:8.4f} {ratio:9.1f}×", flush=True)


if __name__ == "__main__":
    main()
