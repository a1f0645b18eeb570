"""What the ranks of a warm start do: TorchRec's DLRM of production's size, or with more inputs, filled and asked."""

import signal
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard
from lumrec.warm_start import Source, warm_start
from lumrec.warm_start.plan import shards_of

ROWS, WIDTH, NUM_DENSE = {"item": 50, "user": 40}, 8, 5
TABLES = "sparse_arch.embedding_bag_collection.embedding_bags"
FIRST = "dense_arch.model._mlp.0._linear.weight"


def vocabulary(path: Path, keys: Any, rows: Any = None) -> None:
    """Writes a file of raw id → row."""
    frame = pl.DataFrame({"key": keys, "row": list(range(len(keys))) if rows is None else rows})
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)


def dlrm(*, rows: dict[str, int] = ROWS, width: int = WIDTH, num_dense: int = NUM_DENSE, seed: int = 7) -> DLRM:
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=width, num_embeddings=number, feature_names=[name])
        for name, number in rows.items()
    ]
    return DLRM(EmbeddingBagCollection(tables=tables), num_dense, [16, width], [16, 1])


def scores(model: torch.nn.Module, batch: dict[str, torch.Tensor], num_new: int = 0) -> torch.Tensor:
    """Of production's batch, with `num_new` inputs beside the old ones."""
    kjt = KeyedJaggedTensor(list(ROWS), batch["values"], lengths=batch["lengths"])
    new = torch.randn(len(batch["dense"]), num_new, generator=torch.Generator().manual_seed(3))
    model.eval()
    with torch.no_grad():
        return model(torch.cat([batch["dense"], new], dim=1), kjt).squeeze(1)


def rules(*, num_new: int = 0, **of_tables: Any) -> dict[str, Any]:
    """Everything by its own name."""
    first = [{"source": FIRST, "columns": "pad_zero"}] if num_new else []
    return {
        "source_prefix": "model.",
        "optimizer_prefix": "optim.state.",
        "rules": [
            {"source": "", "match": "prefix", "exclude": [f"{TABLES}.*", *(rule["source"] for rule in first)]},
            {"source": f"{TABLES}.", "match": "prefix", **of_tables},
            *first,
        ],
    }


def take_over(
    folder: str,
    out: str,
    sharding: str,
    table_optimizer: str,
    source: str = "dcp",
    num_new: int = 0,
    state: str = "auto",
) -> None:
    """Fills a sharded DLRM; writes its scores, what its state holds (gathered) and the audit to `out`."""
    init_distributed("cpu", threads=1)
    model = shard(
        dlrm(num_dense=NUM_DENSE + num_new),
        device="cpu",
        sharding=sharding,
        optimizer=OptimizerConfig(table_optimizer=table_optimizer),
    )
    optimizer = build_optimizer(model, OptimizerConfig(table_optimizer=table_optimizer))
    dense = optimizer.optimizers[1][1]
    dense.init_state()
    audit = warm_start(
        model, Path(folder) / source, rules(num_new=num_new, optimizer=state), optimizer=optimizer, block_bytes=256
    )
    found = {"scores": scores(model, torch.load(Path(folder) / "batch.pt"), num_new), "audit": audit.text()}
    found["state"] = whole_sums(optimizer.state_tensors())
    found["exp_avg"] = optimizer.state_tensors()[FIRST]["exp_avg"]
    if rank() == 0:
        audit.save(Path(out).parent)
        torch.save(found, out)


def whole_sums(state: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The tables' sums of squares, put together from the shards of all ranks. Collective."""
    shards = [
        (name, tuple(value.size()), shard.first_row, shard.first_column, shard.values)
        for entries in state.values()
        for name, value in entries.items()
        if name.endswith("momentum1")
        for shard in shards_of(value)
    ]
    everywhere: list[Any] = [[]] * world_size()
    dist.all_gather_object(everywhere, shards)
    sums: dict[str, torch.Tensor] = {}
    for name, size, row, column, values in (found for part in everywhere for found in part):
        whole = sums.setdefault(name, torch.full(size, torch.nan)).view(size[0], -1)
        whole[row : row + values.shape[0], column : column + values.shape[1]] = values
    return sums


def remap(folder: str, rules_folder: str, new_rows: str) -> None:
    """Tables of other rows and width, sharded in every way, equal the plain ones; new rows and columns too."""
    init_distributed("cpu", threads=1)
    rule: dict[str, Any] = {
        "rows": "remap",
        "new_rows": new_rows,
        "columns": "pad_zero",
        "parts": [[0, 5, 7], [5, 3, 0]],
    }
    rule |= {"source_vocabulary": f"{folder}/item.csv", "target_vocabulary": "ours.csv"}
    rule |= {"categories": "categories.csv"} if new_rows == "category_mean" else {}
    others = ["dense_arch.*", "over_arch.*", "*.user.weight"]
    name = f"{TABLES}.item.weight"
    given = {"source_prefix": "model.", "optimizer_prefix": "optim.state.", "folder": rules_folder}
    given |= {"rules": [{"source": name, **rule}], "unused": others, "fresh": others}
    plain = dlrm(rows={**ROWS, "item": 23}, width=16)
    warm_start(plain, Path(folder) / "dcp", given)
    state = torch.load(Path(folder) / "model.pt", weights_only=True)["optim"]["state"]
    theirs_S = state[name]["item.momentum1"].mean(1)
    keys = [line.split(",")[0] for line in (Path(rules_folder) / "ours.csv").read_text().split()[1:]]
    expected_sums = torch.stack([theirs_S[int(k[5:])] if k.startswith("item") else torch.zeros(()) for k in keys])
    for sharding in ("row_wise", "column_wise", "table_wise", "data_parallel"):
        model = shard(dlrm(rows={**ROWS, "item": 23}, width=16), device="cpu", sharding=sharding)
        warm_start(model, Path(folder) / "dcp", given, block_bytes=100)
        whole = plain.state_dict()[name]
        for part in shards_of(model.state_dict()[name]):
            rows = slice(part.first_row, part.first_row + part.values.shape[0])
            columns = slice(part.first_column, part.first_column + part.values.shape[1])
            torch.testing.assert_close(part.values, whole[rows, columns])
        if sharding in ("row_wise", "table_wise"):  # elsewhere there is no fused sum, or one for each shard
            found = whole_sums(model.fused_optimizer.state_dict()["state"])["item.momentum1"]
            torch.testing.assert_close(found, expected_sums)


def be_killed(folder: str, out: str, after_reads: int) -> None:
    """Like `take_over` on one process, but killed while it reads."""
    init_distributed("cpu", threads=1)
    read, count = Source.read, 0

    def counted(self: Source, name: str, first: int, last: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > after_reads:
            signal.raise_signal(signal.SIGKILL)
        return read(self, name, first, last)

    Source.read = counted  # type: ignore[method-assign]
    warm_start(dlrm(), Path(folder) / "dcp", rules(), block_bytes=256).save(Path(out))
