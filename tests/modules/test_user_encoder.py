"""User encoders: the cache, the options that change nothing, and what is refused. Shapes as in the module."""

import shutil

import pytest
import torch

from lumrec.modules.layout import extension, make_layout
from lumrec.modules.relative_bias import TokenTimes
from lumrec.modules.user_encoder import ENCODERS, UserEncoder, rotate

DIM, MAX_TOKENS = 16, 24
LENGTHS = torch.tensor([7, 0, 1, MAX_TOKENS - 1, 12])
SEQUENCE, PREFIX = torch.tensor([0, 0, 1, 2, 3, 3, 4]), torch.tensor([7, 3, 0, 1, 23, 5, 12])


def make_encoder(encoder: str, **settings) -> UserEncoder:
    torch.manual_seed(0)
    fixed = {"dim": DIM, "num_layers": 3, "num_heads": 2, "max_tokens": MAX_TOKENS}
    model = UserEncoder(encoder=encoder, **{**fixed, **settings})
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that every part matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def inputs():
    num_tokens, num_queries = int(LENGTHS.sum()), len(SEQUENCE)
    generator = torch.Generator().manual_seed(1)
    x_TD, y_QD = (torch.randn(n, DIM, generator=generator).double() for n in (num_tokens, num_queries))
    time_T = torch.randint(0, 10**6, (num_tokens,), generator=generator).cumsum(0)
    time_Q = torch.randint(10**7, 10**8, (num_queries,), generator=generator)
    return x_TD, y_QD, TokenTimes(time_T, time_T, time_Q, time_Q)


def layouts():
    return make_layout(LENGTHS), make_layout(LENGTHS, query_sequence_Q=SEQUENCE, query_prefix_Q=PREFIX)


@pytest.mark.parametrize("time_bias", [None, True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_asking_a_cache_equals_one_pass(encoder, time_bias):
    model, (x_TD, y_QD, times), (alone, asked) = make_encoder(encoder, time_bias=time_bias), inputs(), layouts()
    with torch.no_grad():
        _, expected = model(x_TD, y_QD, asked, query_prefix_Q=PREFIX, times=times)
        cache = model.keys_and_values(x_TD, alone, times=TokenTimes(times.asked_T, times.seen_T, *[PREFIX[:0]] * 2))
        answer = model.ask(cache, y_QD, asked, query_prefix_Q=PREFIX, times=times)
        _, only = model(x_TD, y_QD, asked, query_prefix_Q=PREFIX, times=times, queries_only=True)
    torch.testing.assert_close(answer, expected)
    torch.testing.assert_close(only, expected)


@pytest.mark.parametrize("time_bias", [None, True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_extending_a_cache_equals_computing_it_again(encoder, time_bias):
    model, (x_TD, _, times) = make_encoder(encoder, time_bias=time_bias), inputs()
    sequence_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
    no_query = [PREFIX[:0]] * 2
    with torch.no_grad():
        whole = model.keys_and_values(
            x_TD, make_layout(LENGTHS), times=TokenTimes(times.asked_T, times.seen_T, *no_query)
        )
        cache, old_B = None, torch.zeros_like(LENGTHS)
        for share in (0.0, 0.4, 0.9, 1.0):
            until_B = (share * LENGTHS).ceil().long()
            place_T = torch.arange(len(x_TD)) - (LENGTHS.cumsum(0) - LENGTHS)[sequence_T]
            seen_T, new_T = (
                place_T < until_B[sequence_T],
                (place_T >= old_B[sequence_T]) & (place_T < until_B[sequence_T]),
            )
            if cache is None:
                layout = make_layout(until_B)
                cache = model.keys_and_values(
                    x_TD[seen_T], layout, times=TokenTimes(times.asked_T[seen_T], times.seen_T[seen_T], *no_query)
                )
            else:
                of_tokens = TokenTimes(*(x[part] for part in (seen_T, new_T) for x in (times.asked_T, times.seen_T)))
                cache = model.extend(cache, x_TD[new_T], extension(old_B, until_B - old_B), times=of_tokens)
            old_B = until_B
    torch.testing.assert_close(cache, whole)


def gradients(model: UserEncoder) -> dict[str, torch.Tensor]:
    (x_TD, y_QD, times), (_, asked) = inputs(), layouts()
    dtype = next(model.parameters()).dtype
    torch.manual_seed(3)  # of dropout
    o_TD, o_QD = model(x_TD.to(dtype), y_QD.to(dtype), asked, query_prefix_Q=PREFIX, times=times)
    (o_TD.square().sum() + o_QD.pow(3).sum()).backward()
    return {"o_TD": o_TD.detach(), "o_QD": o_QD.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_changes_nothing(encoder):
    plain = gradients(make_encoder(encoder, dropout=0.3).train())
    again = gradients(make_encoder(encoder, dropout=0.3, checkpoint_activations=True).train())
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_low_precision_stays_near(encoder):
    """bf16 autocast: as near to float64 as rounding at eight bits lets it be."""
    exact = gradients(make_encoder(encoder))
    model = make_encoder(encoder).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model)
    for name in ("o_TD", "o_QD"):
        assert (low[name].double() - exact[name]).norm() < 0.03 * exact[name].norm(), name


def test_rotary_scores_depend_only_on_the_distance():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    angle = torch.arange(20)[:, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    rotary = torch.cat([angle.cos(), angle.sin()], dim=-1)
    score = (rotate(q.expand(20, 1, 8), rotary)[:, 0] @ rotate(k.expand(20, 1, 8), rotary)[:, 0].t()).diagonal(-3)
    torch.testing.assert_close(score, score[:1].expand(17))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "bert"}, "expected one of gpt, llama, hstu"),
        ({"dim": 10, "num_heads": 3}, "divided into 3 heads"),
        ({"encoder": "llama", "dim": 6, "num_heads": 2}, "make it even"),
        ({"encoder": "hstu", "ffn_dim": 32}, "has no FFN"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UserEncoder(**{"dim": 8, "num_layers": 1, "num_heads": 2, "max_tokens": 4, **settings})


def test_a_bias_of_time_needs_times():
    x_TD, y_QD, _ = inputs()
    with pytest.raises(ValueError, match="times of its tokens"):
        make_encoder("hstu")(x_TD, y_QD, layouts()[1], query_prefix_Q=PREFIX)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler (g++)")
def test_compiled_blocks_change_results_only_by_rounding():
    plain = gradients(make_encoder("llama", num_layers=1))
    compiled = gradients(make_encoder("llama", num_layers=1, compile_blocks=True))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value)
