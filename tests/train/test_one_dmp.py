"""A LUM and a ranker on the same sharded tables: one set of rows, moved by either, as if nothing were sharded."""

import logging
from pathlib import Path

import pytest
import torch
from one_dmp import LR, WEIGHTS, batch_of, make_model
from torch import Tensor, nn

from lumrec.run import logs
from lumrec.run.distributed import init_distributed
from lumrec.train.parallel import shard

LUM, RANKER = "lum.token_encoder.tables.", "ranker.tables."


@pytest.fixture(scope="module")
def words(tiny_words, tiny_prepared) -> list[str]:
    return [*tiny_words, f"runs_dir={tiny_prepared.path.parent}"]


@pytest.fixture(scope="module")
def unsharded(words) -> dict[str, dict[str, Tensor]]:
    """The tables at the start and after each of WEIGHTS, in one process that has the batches of both ranks."""
    config, data, model = make_model(words)
    batches = [batch_of(config, data, model, of_rank) for of_rank in (0, 1)]
    model.requires_grad_(False)
    model.ranker.tables.requires_grad_(True)
    optimizer = torch.optim.SGD(model.ranker.tables.parameters(), lr=LR)
    tables = {"start": {k: v.detach().clone() for k, v in model.ranker.tables.state_dict().items()}}
    for name, weights in WEIGHTS.items():
        optimizer.zero_grad()
        (sum(model(*batch, weights) for batch in batches) / 2).backward()
        optimizer.step()
        tables[name] = {k: v.detach().clone() for k, v in model.ranker.tables.state_dict().items()}
    return tables


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_two_ranks_train_the_shared_tables_as_one_process_does(words, unsharded, forks, tmp_path, sharding):
    forks.run("one_dmp:train", world_size=2, folder=str(tmp_path), words=words, sharding=sharding)
    reports = [torch.load(Path(tmp_path) / f"{sharding}-{rank}.pt") for rank in (0, 1)]
    assert all(report["same"] for report in reports)
    for name, expected in unsharded.items():
        for reader in (LUM, RANKER):
            for table, weight in expected.items():
                whole = torch.full_like(weight, torch.nan)
                for report in reports:
                    for (row, column), part in report["after"][name][reader + table]:
                        whole[row : row + len(part), column : column + part.shape[1]] = part
                assert torch.allclose(whole, weight, atol=2e-5), (name, reader, table)


def test_either_loss_moves_the_rows_that_the_other_reads(unsharded):
    item = "embedding_bags.item_id.weight"
    before, ranker, lum, both = (unsharded[name][item] for name in ("start", "ranker", "lum", "both"))
    for earlier, later in ((before, ranker), (ranker, lum), (lum, both)):
        assert float((later - earlier).abs().max()) > 1e-5


def test_a_shared_collection_is_no_error_in_the_log_and_a_second_dmp_is_refused(words, caplog):
    """The commands leave out what TorchRec logs as an error and does right (lumrec.run.logs)."""
    init_distributed("cpu")
    _, _, model = make_model(words)
    ranker: nn.Module = model.ranker
    tables = ranker.tables
    with caplog.at_level(logging.INFO):
        dmp = shard(model, device="cpu")
    assert [text for record in caplog.records if record.levelno >= logging.ERROR and (text := shown(record))] == []
    assert dmp.module.ranker.tables is dmp.module.lum.token_encoder.tables
    ranker.tables = tables  # as a model that was built beside the first, around its tables
    with pytest.raises(ValueError, match="silently become two separate tables"):
        shard(ranker, device="cpu")


def shown(record: logging.LogRecord) -> str:
    return record.getMessage() if logs.is_news(record) else ""
