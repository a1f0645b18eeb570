"""Kept histories: reading on equals reading everything, and a history that does not fit is read again and says so."""

import logging

import numpy as np
import pytest
import torch

from lumrec.batches.windows import Windows, behind
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.query.group_query import GroupQuery
from lumrec.query.prefix_cache import KeptHistories

MAX_EVENTS = 24
CONDITIONS = [{"feedback": "like"}, {"category": "top 1"}, {}]


@pytest.fixture(scope="module", params=[("gpt", "interleaved"), ("llama", "merged"), ("hstu", "merged")], ids="-".join)
def query(request, tiny_prepared) -> GroupQuery:
    encoder, tokens = request.param
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, tokens=tokens, dim=16, max_events=MAX_EVENTS)
    model, builder = build_lum(config, tiny_prepared)
    with torch.no_grad():
        for parameter in model.user_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return GroupQuery(model.double().eval(), builder, CONDITIONS, max_events=MAX_EVENTS)


def at_once(query: GroupQuery, user_B: torch.Tensor, end_B: torch.Tensor) -> torch.Tensor:
    """Answers from the whole histories before these rows, or as much of them as the LUM sees."""
    first_B = torch.from_numpy(query.data.user_offsets)[user_B]
    length_B = (end_B - first_B).clamp(max=MAX_EVENTS - 1)
    return query.answer(behind(Windows(end_B - length_B, length_B, user_B)))


def test_reading_on_equals_reading_everything(query, caplog):
    data = query.data
    lengths = np.diff(data.user_offsets)
    user_B = torch.from_numpy(np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, 6).astype(int)])
    assert lengths[user_B].min() < MAX_EVENTS - 1 < lengths[user_B].max()
    kept, first_B, last_B = (
        KeptHistories(query, user_B),
        *(torch.from_numpy(data.user_offsets)[user_B + n] for n in (0, 1)),
    )
    caplog.set_level(logging.INFO)
    told = []
    for events in (0, 1, 5, MAX_EVENTS - 1, MAX_EVENTS, 10**6):
        end_B = torch.minimum(first_B + events, last_B)
        o_BND, anew_B = kept.advance(end_B)
        torch.testing.assert_close(o_BND, at_once(query, user_B, end_B), atol=1e-6, rtol=1e-5)
        assert torch.equal(anew_B, end_B - first_B > MAX_EVENTS - 1)
        told.append(caplog.text.count("are read again"))
        tokens = int((end_B - first_B)[~anew_B].sum()) * query.builder.tokens_per_event
        assert kept.num_bytes == 2 * 2 * tokens * 16 * 8  # keys and values, layers, tokens, width, float64
    assert told == [0, 0, 0, 0, 1, 2]


def test_an_end_that_lies_elsewhere_is_refused(query):
    kept = KeptHistories(query, torch.tensor([0, 1]))
    kept.advance()
    with pytest.raises(ValueError, match="histories only grow"):
        kept.advance(kept.first_B)
