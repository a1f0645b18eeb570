"""Exported LUMs give the answers of the LUMs themselves, for any sizes, and run where lumrec is not."""

import numpy as np
import pytest
import torch
from elsewhere import run_elsewhere

from lumrec.models.lum import ModelConfig, build_lum
from lumrec.query.group_query import GroupQuery, row_windows, serving_windows
from lumrec.run.errors import UserError
from lumrec.serving.lum_graph import ExportedLum, LumGraph, LumSpec, export_lum, lum_inputs
from lumrec.serving.tables import table_weights

CONDITIONS = [{"feedback": "like"}, {}, {"feedback": "dislike", "scenario": "search"}]


def query_of(data, encoder: str, tokens: str, **changes) -> GroupQuery:
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, tokens=tokens, dim=16, max_events=12, **changes)
    model, builder = build_lum(config, data)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return GroupQuery(model.eval(), builder, CONDITIONS if builder.condition_features else [{}], max_events=12)


def inputs_of(query: GroupQuery, user_B: torch.Tensor, spec: LumSpec, conditions=None):
    asked = query.asked if conditions is None else query.of_request(len(user_B), conditions)
    windows = serving_windows(query.data, user_B, max_events=query.max_events)
    return lum_inputs(query.pack(windows, asked, torch.arange(len(user_B))), spec)


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
@pytest.mark.parametrize(
    "encoder, changes", [("gpt", {}), ("llama", {"time_bias": True}), ("hstu", {}), ("gpt", {"conditions": []})]
)
def test_what_is_exported_gives_the_lum_s_answers(tiny_prepared, encoder, changes, tokens):
    """Before torch.export, which is slow; users without events are among them."""
    query = query_of(tiny_prepared, encoder, tokens, **changes)
    spec = LumSpec.of(query)
    graph, tables = LumGraph(query.model, spec), table_weights(query.model.token_encoder.tables)
    for user_B in (torch.arange(tiny_prepared.num_users), torch.tensor([3]), torch.tensor([0, 0, 5])):
        with torch.no_grad():
            answers = graph(inputs_of(query, user_B, spec), tables, {})
        torch.testing.assert_close(answers, query.users(user_B), atol=2e-6, rtol=1e-5)


def test_an_exported_lum_answers_as_the_lum_also_where_only_torch_is(tiny_prepared, tmp_path):
    query = query_of(tiny_prepared, "hstu", "merged")
    spec = export_lum(query, tmp_path)
    lum = ExportedLum(tmp_path)
    for user_B, conditions in ((torch.arange(17), None), (torch.tensor([2]), [{"scenario": "home"}, {}])):
        inputs = inputs_of(query, user_B, spec, conditions and [conditions] * len(user_B))
        expected = query.ask([query.data.user_keys()[u] for u in user_B], conditions or CONDITIONS)
        torch.testing.assert_close(lum(inputs), expected, atol=2e-6, rtol=1e-5)
    (answers,) = run_elsewhere([(tmp_path / "lum.pt2", (inputs, *lum.tables))])
    assert torch.equal(answers, lum(inputs))
    assert torch.equal(lum.items_ID, query.items())
    with pytest.raises(ValueError, match="the same number of queries"):
        answering = row_windows(query.data, torch.arange(3), max_events=12, stride=6)
        lum_inputs(query.pack(answering, query.asked, torch.arange(answering.windows.count)), spec)


def test_a_lum_that_does_not_give_its_golden_answers_or_is_damaged_is_refused(tiny_prepared, tmp_path):
    query = query_of(tiny_prepared, "gpt", "interleaved")
    assert export_lum(query, tmp_path, dtype="int8").dtype == "int8"
    for file in (tmp_path / "tables").glob("*-scale.npy"):
        np.save(file, 3 * np.load(file))
    with pytest.raises(UserError, match="does not give its golden vectors"):
        ExportedLum(tmp_path)
    (tmp_path / "golden.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged"):
        ExportedLum(tmp_path)
    query.model.train()
    with pytest.raises(ValueError, match="call eval"):
        export_lum(query, tmp_path)
