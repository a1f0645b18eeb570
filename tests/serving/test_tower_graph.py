"""Exported towers give the vectors of the towers, for any sizes."""

import dataclasses

import pytest
import torch
from tiny_towers import AGES, HISTORIES, ITEMS, draw_knowledge, make_batch, make_towers

from lumrec.run.errors import UserError
from lumrec.serving.tables import Tables, open_tables, table_weights, write_tables
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


def test_exported_towers(tmp_path):
    towers = make_towers(pooling="attention", knowledge=(2, 3, 2), similarity="dot").eval()
    export_towers(towers, tmp_path)
    write_tables(tmp_path / "tables", towers.tables)
    opened = Towers(tmp_path, open_tables(tmp_path / "tables"))
    for size in SIZES:
        assert_same(opened.users, opened.items, towers, size)
    plain = dataclasses.replace(batch_of(towers, *SIZES[0]), o_BNW=None)
    with pytest.raises(ValueError, match="the batch has none"):
        opened.users(plain)
    with pytest.raises(ValueError, match="call eval"):
        export_towers(make_towers(), tmp_path)
    half = {name: rows.half() for name, rows in opened.tables.rows.items()}
    with pytest.raises(UserError, match="is float16, and .* was exported for float32"):
        Towers(tmp_path, Tables(half, {}))
