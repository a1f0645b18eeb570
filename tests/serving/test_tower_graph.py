"""Exported towers give the vectors of the towers, for any sizes."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_towers import AGES, HISTORIES, ITEMS, draw_knowledge, make_batch, make_towers

from lumrec.models.towers import TowersConfig, build_towers
from lumrec.run.errors import UserError
from lumrec.serving.tables import table_weights, write_tables
from lumrec.serving.tower_graph import TowerGraph, Towers, TowerSpec, export_towers, tower_inputs

SIZES = [(HISTORIES, ITEMS, AGES), ([[]], [3], [2]), ([[4]], [3, 3], [0])]


def batch_of(towers, histories, items, ages):
    return make_batch(histories, items, ages, draw_knowledge(len(ages), len(items)) if towers.has_knowledge else None)


@torch.no_grad()
def assert_same(users, items, towers, size):
    batch = batch_of(towers, *size)
    o_BV, e_CV = towers(batch)
    torch.testing.assert_close(users(batch), o_BV, atol=1e-6, rtol=0)
    torch.testing.assert_close(items(batch), e_CV, atol=1e-6, rtol=0)


@pytest.mark.parametrize("knowledge", [None, (2, 3, 2)])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_what_is_exported_gives_the_towers_vectors(pooling, knowledge):
    """Before torch.export, which is slow."""
    towers = make_towers(pooling=pooling, knowledge=knowledge, similarity="dot").eval()
    if pooling == "attention":
        torch.nn.init.normal_(towers.distance_bias_L)
    spec, tables = TowerSpec.of(towers), table_weights(towers.tables)

    def of(side):
        return lambda batch: TowerGraph(towers, spec, side)(tower_inputs(batch, spec, side), tables, {})

    for size in SIZES:
        assert_same(of("users"), of("items"), towers, size)


def drawn(tiny_prepared):
    torch.manual_seed(0)
    config = TowersConfig(conditions=["scenario"], dim=8, max_history=6)
    towers, builder = build_towers(config, tiny_prepared)
    return towers.eval(), builder


def test_exported_towers(tiny_prepared, tmp_path):
    towers, builder = drawn(tiny_prepared)
    export_towers(towers, builder, tmp_path)
    opened = Towers(tmp_path)
    items = np.arange(tiny_prepared.num_items)
    for rows, some in ((np.arange(100), items), (np.array([7]), items[3:4])):
        batch = builder.towers(rows, some)
        with torch.no_grad():
            o_BV, e_CV = towers(batch)
        torch.testing.assert_close(opened.users(batch), o_BV, atol=1e-6, rtol=0)
        torch.testing.assert_close(opened.items(batch), e_CV, atol=1e-6, rtol=0)
        torch.testing.assert_close(opened.items_IV[some], e_CV, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="call eval"):
        export_towers(towers.train(), builder, tmp_path)


def test_exported_towers_that_are_not_whole_are_refused(tiny_prepared, tmp_path):
    export_towers(*drawn(tiny_prepared), tmp_path)
    write_tables(tmp_path / "tables", drawn(tiny_prepared)[0].tables, dtype="float16")
    with pytest.raises(UserError, match="is float16, and .* was exported for float32"):
        Towers(tmp_path)
    other, _ = drawn(tiny_prepared)
    torch.nn.init.normal_(next(other.tables.parameters()))
    write_tables(tmp_path / "tables", other.tables)
    with pytest.raises(UserError, match="does not give its golden vectors"):
        Towers(tmp_path)
    (tmp_path / "golden.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged"):
        Towers(tmp_path)


def test_a_batch_without_the_knowledge_that_towers_read_is_refused():
    towers = make_towers(knowledge=(2, 3, 2)).eval()
    plain = dataclasses.replace(batch_of(towers, *SIZES[0]), o_BNW=None)
    with pytest.raises(ValueError, match="the batch has none"):
        tower_inputs(plain, TowerSpec.of(towers), "users")
