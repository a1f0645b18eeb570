"""What test_torchrec_models.py runs: TorchRec's own models with knowledge, trained under DistributedModelParallel.

A click is planted in the knowledge (is the first answer nearer to the target than the second?) and, weakly, in an id.
Shapes: B rows, N answers, D width of the LUM, K LUMs.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny_training import weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN

from lumrec.metrics.ranking import auc
from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
from lumrec.modules.moments import average_moments
from lumrec.modules.torchrec_models import KnowledgeModel
from lumrec.run.distributed import init_distributed, rank
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard

N, D, K = 2, 4, 2
IDS = {"user": 40, "item": 30, "page": 5}
MODELS = ("DLRM", "DLRM_DCN", "SimpleDeepFMNN")
STEPS, ROWS = 120, 256
Batch = tuple[Tensor, KeyedJaggedTensor, KnowledgeBatch, Tensor]


def make_model(name: str, *, seed: int = 0) -> nn.Module:
    """A model as a user has it: three dense features, three tables."""
    torch.manual_seed(seed)
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{key}", embedding_dim=8, num_embeddings=rows, feature_names=[key])
            for key, rows in IDS.items()
        ]
    )
    if name == "SimpleDeepFMNN":
        return SimpleDeepFMNN(3, tables, hidden_layer_size=16, deep_fm_dimension=8)
    sizes = {"dense_in_features": 3, "dense_arch_layer_sizes": [16, 8], "over_arch_layer_sizes": [16, 1]}
    return DLRM(tables, **sizes) if name == "DLRM" else DLRM_DCN(tables, **sizes, dcn_num_layers=2, dcn_low_rank_dim=4)


def make_fusion(mode: str = "both") -> KnowledgeFusion:
    return KnowledgeFusion(mode, N, D, K, 6, attention=True)


def make_batch(seed: int, rows: int) -> Batch:
    """dense features, ids, knowledge (a tenth of the rows have none), label."""
    generator = torch.Generator().manual_seed(seed)
    ids = {key: torch.randint(rows_of, (rows,), generator=generator) for key, rows_of in IDS.items()}
    sparse = KeyedJaggedTensor.from_lengths_sync(
        list(IDS), torch.cat(list(ids.values())), torch.ones(len(IDS) * rows, dtype=torch.int64)
    )
    o_BND, e_BD = (torch.randn(rows, *rest, generator=generator) for rest in ([N, D], [D]))
    present_B1 = torch.rand(rows, 1, generator=generator) < 0.9
    knowledge = KnowledgeBatch(
        o_BND,
        e_BD,
        torch.randn(rows, N, generator=generator),
        present_B1.expand(-1, N),
        torch.randint(K, (rows,), generator=generator),
    )
    score_B = torch.einsum("bnd,bd->bn", o_BND, e_BD) @ torch.tensor([1.0, -1.0])
    label_B = (score_B * present_B1[:, 0] + (ids["user"] % 2) > 0.5).float()
    return torch.randn(rows, 3, generator=generator), sparse, knowledge, label_B


def loss_of(name: str, output_B1: Tensor, label_B: Tensor) -> Tensor:
    """SimpleDeepFMNN ends with a sigmoid, the others do not."""
    loss = F.binary_cross_entropy if name == "SimpleDeepFMNN" else F.binary_cross_entropy_with_logits
    return loss(output_B1.squeeze(1), label_B)


def train(folder: str, name: str) -> None:
    """Trains one model on two ranks and leaves what it learnt in `folder`/<name>-<rank>.json."""
    device = init_distributed("cpu", threads=1)
    model = KnowledgeModel(make_model(name), make_fusion())
    settings = OptimizerConfig(dense_lr=1e-2)
    dmp = shard(model, device=device, optimizer=settings)
    optimizer, before = build_optimizer(dmp, settings), weights_of(dmp)
    for step in range(STEPS):
        dense, sparse, knowledge, label_B = make_batch(2 * step + rank(), ROWS // 2 + rank())
        optimizer.zero_grad()
        loss_of(name, dmp(dense, sparse, knowledge), label_B).backward()
        optimizer.step()
    scale = model.fusion.matching_scale
    scale.is_started_F[0] = float(rank())  # as if rank 0 had not met the first column
    own = scale.mean_F.tolist()
    average_moments(dmp)
    moments = {"own": own, "mean": scale.mean_F.tolist(), "is_started": scale.is_started_F.tolist()}
    dmp.eval()
    dense, sparse, knowledge, label_B = make_batch(1_000_000, 2000)
    absent = knowledge._replace(present_BN=torch.zeros_like(knowledge.present_BN))
    with torch.no_grad():
        scores = [dmp(dense, sparse, what).squeeze(1).numpy().astype(np.float64) for what in (knowledge, absent)]
    after = weights_of(dmp)
    try:
        dmp(dense, sparse.permute([1, 0, 2]), knowledge)
        refused = ""
    except ValueError as error:
        refused = str(error)
    report = {
        "moments": moments,
        "refused": refused,
        "auc": auc(label_B, scores[0]),
        "auc_absent": auc(label_B, scores[1]),
        "moved": {key: not torch.equal(value, after[key]) for key, value in before.items()},
    }
    (Path(folder) / f"{name}-{rank()}.json").write_text(json.dumps(report))
    dist.barrier()
