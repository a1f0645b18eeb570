"""The embedding tables of an exported model: float32, float16 or int8 rows in files that all workers memory-map.

    tables/tables.json     dtype, and for each table its name, rows, width and files
           0.npy           rows of the first table, [rows, width]
           0-scale.npy     int8 only: the scale of each row, float32 [rows]

Shape suffixes: N rows of a table, D its width, V values of a feature, S bags.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.run.errors import UserError
from lumrec.run.files import read_json, sync_tree, write_atomically

TableDtype = Literal["float32", "float16", "int8"]
CHUNK_ROWS = 1 << 16  # converted at once
HIGHEST = 127  # largest int8


class Tables(NamedTuple):
    """rows: name → [N, D], float32, float16 or int8. scales: name → float32 [N]; only of int8 tables."""

    rows: dict[str, Tensor]
    scales: dict[str, Tensor]


def write_tables(folder: str | Path, tables: nn.Module, *, dtype: TableDtype = "float32") -> None:
    """Writes the tables of an EmbeddingBagCollection, sharded or not, into the folder, which is created.

    int8: each row is divided by its largest absolute value / 127 and rounded. Raises UserError for a table of which
    another process has a part, and for one with values that the dtype cannot hold (NaN, infinite or too large).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (name, weight_ND) in enumerate(table_weights(tables).items()):
        file, scale_file = f"{number}.npy", f"{number}-scale.npy"
        num_rows, width = weight_ND.shape
        rows = np.lib.format.open_memmap(folder / file, "w+", np.dtype(dtype), (num_rows, width))
        scales = np.ones(num_rows, np.float32)
        for first in range(0, num_rows, CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            x_ND = weight_ND[chunk].detach().float().cpu().numpy()
            if dtype == "int8":
                scales[chunk] = np.abs(x_ND).max(axis=1) / HIGHEST
                x_ND = np.rint(x_ND / np.where(scales[chunk] > 0, scales[chunk], 1.0)[:, None])
                finite = np.isfinite(scales[chunk]).all()
            else:
                with np.errstate(over="ignore"):
                    x_ND = x_ND.astype(dtype)
                finite = np.isfinite(x_ND).all()
            if not finite:
                raise UserError(f"table {name!r} has values that {dtype} cannot hold: NaN, infinite or too large")
            rows[chunk] = x_ND
        rows.flush()
        entry = {"name": name, "rows": num_rows, "width": width, "file": file}
        if dtype == "int8":
            np.save(folder / scale_file, scales)
            entry["scale"] = scale_file
        listed.append(entry)
    write_atomically(folder / "tables.json", json.dumps({"dtype": dtype, "tables": listed}, indent=2) + "\n")
    sync_tree(folder)


def open_tables(folder: str | Path) -> Tables:
    """The tables of a folder that `write_tables` wrote, memory-mapped: processes that open them share their memory.

    Raises MissingFileError or UserError if a file is missing or does not fit tables.json.
    """
    folder = Path(folder)
    content = read_json(folder / "tables.json", again="export the ranker again")
    rows, scales = {}, {}
    for entry in content["tables"]:
        shape = (entry["rows"], entry["width"])
        rows[entry["name"]] = _mapped(folder / entry["file"], content["dtype"], shape)
        if content["dtype"] == "int8":
            scales[entry["name"]] = _mapped(folder / entry["scale"], "float32", shape[:1])
    return Tables(rows, scales)


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> Tensor:
    try:
        # "c": a page stays shared unless this process writes to it, and torch takes only writable memory.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the ranker again") from None
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise UserError(f"{path} holds {array.dtype} {array.shape}, expected {dtype} {shape}; export the ranker again")
    return torch.from_numpy(array)


def table_weights(tables: nn.Module) -> dict[str, Tensor]:
    """Each table of an EmbeddingBagCollection, whole, [N, D], by its name; also of one sharded within one process."""
    weights = {}
    for key, weight in tables.state_dict().items():
        name = key.removeprefix("embedding_bags.").removesuffix(".weight")
        weights[name] = _whole(weight, name) if isinstance(weight, ShardedTensor) else weight.detach()
    return weights


def _whole(weight: ShardedTensor, name: str) -> Tensor:
    shards = weight.local_shards()
    if sum(shard.tensor.numel() for shard in shards) != weight.size().numel():
        raise UserError(f"table {name!r} is spread over several processes: export it with one process")
    if len(shards) == 1:
        return shards[0].tensor.detach()
    whole_ND = torch.empty(weight.size(), dtype=weight.dtype)
    for shard in shards:
        (row, column), (num_rows, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        whole_ND[row : row + num_rows, column : column + width] = shard.tensor
    return whole_ND


def pooled(table_ND: Tensor, scale_N: Tensor | None, values_V: Tensor, offsets_S1: Tensor) -> Tensor:
    """The mean of each bag's rows, float32 [S, D], 0 for an empty bag: what an EmbeddingBagCollection gives.

    >>> rows, scales = torch.tensor([[0, 0], [127, 0], [0, -127]], dtype=torch.int8), torch.tensor([0.0, 2.0, 1.0])
    >>> pooled(rows, scales / 127, torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1, 3])).tolist()
    [[2.0, 0.0], [0.0, 0.0], [1.0, -0.5]]
    """
    if table_ND.dtype != torch.float32:  # only the rows that are read become float32
        row_VD = table_ND.index_select(0, values_V).float()
        table_ND = row_VD if scale_N is None else row_VD * scale_N.index_select(0, values_V)[:, None]
        values_V = torch.arange(values_V.shape[0])
    return F.embedding_bag(values_V, table_ND, offsets_S1, mode="mean", include_last_offset=True)


def embedded(
    names: Sequence[str],
    inputs: Mapping[str, Tensor],
    table_of: Mapping[str, str],
    tables: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> Tensor:
    """The pooled rows of features, concatenated: float32 [S, sum of D]. inputs: as `bags` makes them."""
    return torch.cat(
        [
            pooled(
                tables[table_of[name]],
                scales.get(table_of[name]),
                inputs[f"values:{name}"],
                inputs[f"offsets:{name}"],
            )
            for name in names
        ],
        dim=1,
    )


def bags(
    tokens: KeyedJaggedTensor, num_tokens: int, token_features: Sequence[str], row_features: Sequence[str]
) -> dict[str, Tensor]:
    """Values and offsets (int64) of the bags of each feature of tokens and of rows (see RankBatch)."""
    inputs, stride, keys, values = {}, tokens.stride(), tokens.keys(), tokens.values().numpy()
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths().numpy(), dtype=np.int64)])
    for names, begin, end in ((token_features, 0, num_tokens), (row_features, num_tokens, stride)):
        for name in names:
            first = keys.index(name) * stride
            own = offsets[first + begin : first + end + 1]
            inputs[f"values:{name}"] = torch.from_numpy(values[own[0] : own[-1]])
            inputs[f"offsets:{name}"] = torch.from_numpy(own - own[0])
    return inputs
