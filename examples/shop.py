"""A small shop's clicks: a LUM learns from them, says by title what a user will like, and goes into TorchRec's DLRM.

    python examples/shop.py        # from the top of the checkout; under a minute on two cores

The log has 300 rows, so the figures mean nothing: put your own log into shop.yaml (docs/how-to/own-data.md).
"""

import sys

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

import lumrec
from lumrec.modules import KnowledgeFusion, KnowledgeModel

config = lumrec.load_config("examples/shop/shop.yaml", sys.argv[1:])
data = lumrec.prepare_data(config)  # examples/shop/*.csv, checked, sorted and split
lumrec.fit_lum(config)  # step 1
knowledge = lumrec.build_knowledge(config)  # step 2: an answer per row and condition, and per user

# What will the first user like? The similarity of each answer with each product, by title.
store = lumrec.KnowledgeStore.open(config.folder("query"))
titles, (item_keys, e_KID) = dict(zip(data.item_keys(), data.item_titles())), store.items()
answers = store.get(data.user_keys()[:1])
for condition, o_D in zip(store.conditions, answers.o_BND[0]):
    best = (e_KID[answers.fold_B[0]] @ o_D).topk(3).indices.tolist()
    print(f"{data.user_keys()[0]}, {condition}: {', '.join(titles[item_keys[i]] for i in best)}")

# Step 3: your TorchRec model, with the answers beside its dense features. Before training it scores as before.
EPOCHS = 5
torch.manual_seed(0)
sizes = {"user": data.num_users, "product": data.num_items}
tables = [EmbeddingBagConfig(name=n, feature_names=[n], embedding_dim=8, num_embeddings=i) for n, i in sizes.items()]
dlrm = DLRM(EmbeddingBagCollection(tables=tables), 1, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[8, 1])
num_lums, _, dim = knowledge.items_e.shape
fusion = KnowledgeFusion("both", knowledge.num_conditions, dim, num_lums, 16)
model = KnowledgeModel(dlrm, fusion)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)


def logits(rows: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([data.user[rows], data.item[rows]]))
    sparse = KeyedJaggedTensor.from_lengths_sync(list(sizes), ids, torch.ones_like(ids))
    price = torch.from_numpy(data.dense["price"][data.item[rows], None])
    return model(price, sparse, knowledge.batch(rows, data.item[rows])).squeeze(1)  # for_rows, beside the items


train, test = (np.flatnonzero(data.split == split) for split in (0, 2))
for _ in range(EPOCHS):
    loss = binary_cross_entropy_with_logits(logits(train), torch.from_numpy(data.label[train]))
    optimizer.zero_grad(), loss.backward(), optimizer.step()
with torch.no_grad():
    test_loss = binary_cross_entropy_with_logits(model.eval() and logits(test), torch.from_numpy(data.label[test]))
print(f"log loss after {EPOCHS} epochs: train {loss:.3f}, test {test_loss:.3f}")
