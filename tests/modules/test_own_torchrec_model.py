"""docs/how-to/own-torchrec-model.md: its code runs as it stands there, from the store to the model's logits."""

import re
from pathlib import Path

import torch
from small_store import publish
from torchrec import KeyedJaggedTensor

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-torchrec-model.md"


def test_the_pages_code_runs_and_scores_start_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(tmp_path / "runs" / "shop-query", keys=["4711", "0815"], items=["p02", "p08"])
    own_model, once, each_batch, checkpoint, export, means = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    names: dict = {}
    building, loading = own_model.split("model.load_state_dict")
    exec(building, names)
    torch.save(names["model"].state_dict(), "production.pt")
    exec("model.load_state_dict" + loading, names)
    plain = names["model"](names["dense_features"], names["sparse_features"])
    exec(once, names)
    exec(each_batch, names)
    exec(checkpoint, names)
    # p11 is no item of the LUM's, and "new" no user of it.
    assert names["knowledge"].present_BN.tolist() == [[True] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert torch.equal(names["logits"], plain) and plain.shape == (4, 1)
    with torch.no_grad():
        names["model"].model.dense_arch.model._mlp[0]._linear.added_weight.fill_(0.1)
    exec(each_batch, names)
    changed = (names["logits"] != plain)[:, 0].tolist()
    assert changed == [True, False, True, False]
    exec(export, names)
    with torch.no_grad():
        expected = names["model"](names["dense_features"], names["sparse_features"], names["knowledge"])
        one = names["knowledge"]._make(x[:1] for x in names["knowledge"])
        product = KeyedJaggedTensor(
            ["user", "product"], torch.tensor([17, 8]), lengths=torch.ones(2, dtype=torch.int64)
        )
        of_one = names["model_inputs"](names["dense_features"][:1], product, one)
        alone = names["model"](names["dense_features"][:1], product, one)
    torch.testing.assert_close(names["scores"], expected)
    torch.testing.assert_close(names["read_graph"](Path("model.pt2"))(of_one), alone)
    exec(means, names)
