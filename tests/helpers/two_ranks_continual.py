"""A LUM that goes on from an earlier one, on two ranks: `torchrun --nproc-per-node 2 two_ranks_continual.py FOLDER`.

FOLDER holds what two_logs.py and a run "before-pretrain" of one rank made; answers-<sharding>.pt come out.
"""

import sys
from pathlib import Path

import torch
from two_logs import answers, config_of

from lumrec.data.prepared import PreparedData
from lumrec.models.lum import build_lum
from lumrec.run.distributed import init_distributed, rank
from lumrec.stages.registry import STAGES
from lumrec.train.parallel import shard
from lumrec.warm_start.continual import find_earlier, start_from


def main(folder: Path) -> None:
    """What each process does."""
    device = init_distributed("cpu", threads=1)
    config = config_of(folder, "grown")
    before, data = (PreparedData.open(folder / "runs" / f"{name}-prepare") for name in ("before", "grown"))
    earlier = find_earlier(config, config.model, config.pretrain.start_from, data)
    for sharding in ("row_wise", "table_wise", "column_wise"):
        model, builder = build_lum(config.model, data)
        dmp = shard(model, device=device, sharding=sharding, fsdp=sharding == "row_wise")
        # One sum per row and shard does not grow with the rows.
        state = "fresh" if sharding == "column_wise" else "keep"
        start_from(dmp, earlier, config.model, data.schema, table_state=state)
        said = answers(dmp, builder, before)
        if rank() == 0:
            torch.save(said, folder / f"answers-{sharding}.pt")
    STAGES["pretrain"].run(config_of(folder, "grown", "run=two-ranks", "pretrain.train.sharding=row_wise"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
