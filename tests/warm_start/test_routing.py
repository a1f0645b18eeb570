"""Managed collisions (ZCH): raw ids find their rows after a takeover, or it is refused."""

import re

import pytest
import torch
from routed import RULES, SLOTS, routed
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.train.checkpoint import Checkpointer, load_weights
from lumrec.train.parallel import shard
from lumrec.warm_start import warm_start

TABLE = "mc._embedding_module.embedding_bags.item.weight"
IDS = "mc._managed_collision_collection._managed_collision_modules.item._mch_sorted_raw_ids"


@pytest.fixture(scope="module")
def saved(forks, tmp_path_factory):
    """What two ranks saved, having taken it over themselves: see routed.py."""
    folder = tmp_path_factory.mktemp("routed")
    forks.run("routed:save_and_take_over", world_size=2, folder=str(folder))
    dcp_to_torch_save(folder / "zch", folder / "zch.pt")
    return folder


@pytest.mark.parametrize(
    ("source", "said"), [("zch", "saved in 2 shards and are loaded in 1"), ("zch.pt", "raw ids are not sorted")]
)
def test_routing_of_two_ranks_is_refused_on_one(saved, source, said):
    model = routed(seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{re.escape(IDS)}' cannot be taken: .*{said}.*say rows=remap"):
        warm_start(model, saved / source, RULES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_routing_goes_with_its_rows_or_not_at_all(tmp_path):
    production = routed(seed=1)
    state = {f"model.{name}": value for name, value in production.state_dict().items()}
    torch.save(state, tmp_path / "zch.pt")
    ours = routed(seed=2)
    warm_start(ours, tmp_path / "zch.pt", RULES)
    assert torch.equal(ours.state_dict()[TABLE], production.state_dict()[TABLE])
    table, routing = {"source": TABLE}, ["mc._managed_collision_collection.*"]
    plain = nn.Module()
    plain.table = nn.Embedding(SLOTS, 8)
    to_plain = RULES | {"rules": [table | {"target": "table.weight"}], "unused": routing}
    by_place = "is taken by place, but its raw ids are routed by .*, which is not taken"
    fresh = RULES | {"rules": [table], "unused": routing, "fresh": routing}
    grown = RULES | {"rules": [table | {"rows": "grow"}, {"source": "mc._managed", "match": "prefix"}]}
    without = RULES | {"rules": [{"source": "mc._managed", "match": "prefix"}], "unused": [TABLE], "fresh": [TABLE]}
    for model, rules, said in [
        (plain, to_plain, by_place),
        (ours, fresh, f"{by_place}.*|gets rows of the source, but .* does not"),
        (ours, grown, "these rows are not taken as they are"),
        (ours, without, "these rows are not taken as they are"),
    ]:
        with pytest.raises(ValueError, match=said):
            warm_start(model, tmp_path / "zch.pt", rules)


def test_renamed_or_crossed_routing_is_found(tmp_path):
    """Production's table may lie outside of a collection; and no buffer may go to another table than its rows."""
    state, routing = routed(seed=1).state_dict(), IDS.removesuffix("item._mch_sorted_raw_ids")
    renamed = {name.replace(routing, "zch.").replace(TABLE, "emb.item.weight"): value for name, value in state.items()}
    torch.save(renamed, tmp_path / "renamed.pt")
    plain = nn.Module()
    plain.item = nn.Embedding(SLOTS, 8)
    rules = {"rules": [{"source": "emb.", "match": "prefix", "target": ""}], "unused": ["zch.*"]}
    with pytest.raises(
        ValueError, match="'emb.item.weight' is taken by place, but its raw ids are routed by 'zch.item"
    ):
        warm_start(plain, tmp_path / "renamed.pt", rules)
    everything = {
        "rules": [
            {"source": "emb.item.weight", "target": TABLE},
            {"source": "zch.", "match": "prefix", "target": routing},
        ]
    }
    warm_start(routed(seed=2), tmp_path / "renamed.pt", everything)
    two = {
        f"{kind}.{table}.{name}": torch.zeros(size)
        for table in "ab"
        for kind, name, size in (("embedding_bags", "weight", (3, 2)), ("ids", "_mch_sorted_raw_ids", 3))
    }
    torch.save(two, tmp_path / "two.pt")
    model = nn.Module()
    for kind in ("embedding_bags", "ids"):
        model.add_module(kind, nn.ModuleDict({table: nn.Module() for table in "ab"}))
        for table in "ab":
            name, value = next((n.split(".")[2], v) for n, v in two.items() if n.startswith(f"{kind}.{table}"))
            model.get_submodule(f"{kind}.{table}").register_buffer(name, value.clone())
    straight = {"source": "", "match": "prefix"}
    warm_start(model, tmp_path / "two.pt", {"rules": [straight]})
    crossed = [{"source": f"ids.{one}.", "match": "prefix", "target": f"ids.{other}."} for one, other in ("ab", "ba")]
    with pytest.raises(
        ValueError, match="'ids.a._mch.*' goes to 'ids.b._mch.*rows that it routes raw ids to go to 'emb"
    ):
        warm_start(model, tmp_path / "two.pt", {"rules": [straight | {"exclude": ["ids.*"]}, *crossed]})


def test_neither_shard_nor_lumrecs_checkpoints_take_managed_collisions(tmp_path):
    init_distributed("cpu")
    for refused in (
        lambda: shard(routed(seed=1), device="cpu"),
        lambda: Checkpointer(tmp_path, model=routed(seed=1), optimizer=None),
        lambda: load_weights(tmp_path, routed(seed=1)),
    ):
        with pytest.raises(UserError, match="belongs to managed collisions") as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("bucket", "said"), [(4, "the source has 2 buckets, the model 4"), (None, "is missing, so")])
def test_buckets_of_hashed_managed_collisions(tmp_path, bucket, said):
    def model(buckets: int | None) -> nn.Module:
        made, modules = nn.Module(), nn.Module()
        made.embedding_bags = nn.ModuleDict({"item": nn.Embedding(8, 4)})
        modules.register_buffer("_hash_zch_identities", torch.arange(8)[:, None])
        if buckets:
            modules.register_buffer("_hash_zch_bucket", torch.tensor([[buckets]]))
        made.routing = nn.ModuleDict({"item": modules})
        return made

    everything = {"rules": [{"source": "", "match": "prefix"}]}
    torch.save(model(2).state_dict(), tmp_path / "hash.pt")
    warm_start(model(2), tmp_path / "hash.pt", everything)
    if bucket is None:
        torch.save(model(None).state_dict(), tmp_path / "hash.pt")
    with pytest.raises(ValueError, match=said):
        warm_start(model(bucket), tmp_path / "hash.pt", everything)
