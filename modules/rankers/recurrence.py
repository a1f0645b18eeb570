"""GRU with attentional update gate over jagged histories (DIEN, 1809.03672 section 4.3), and its plain twin.

Shape suffixes: see rankers/jagged.py; X distinct inputs, H width of the state, G = 3H gates (update, reset, candidate),
N events of a chunk, in order of time: all first events, then all second ones, …
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.rankers.jagged import row_chunks


def recurrence(
    gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None = None
) -> Tensor:
    """State of each row behind each of its events, [T, H], from a state of zeros before the first::

        u, r = sigmoid(gate_ur + W_ur h)      h~ = tanh(gate_c + r * (W_c h))      h' = (1 - a u) h + a u h~

    gate_XG: the inputs already multiplied by their weights, with the biases; event t reads row index_T[t], so that an
    input that occurs in many histories is multiplied once. weight_GH: W. attention_T: a; None: 1, a plain GRU (with
    DIEN's update gate, which is 1 - z of PyTorch's).

    The loop is over time, over the rows that still have an event. What it keeps is the states alone: the gates of the
    backward pass are computed again, all events at once, and the loop back has one small product a step in it.
    """
    return _Recurrence.apply(gate_XG, index_T, weight_GH, offsets_B1, attention_T)


def plain_recurrence(
    gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None = None
) -> Tensor:
    """The same as `recurrence`, row by row and event by event: what it is tested against."""
    states, width = [], weight_GH.shape[1]
    for start, end in zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist()):
        h_H = gate_XG.new_zeros(width)
        for t in range(start, end):
            x_u, x_r, x_c = gate_XG[index_T[t]].split(width)
            h_u, h_r, h_c = (weight_GH @ h_H).split(width)
            u = torch.sigmoid(x_u + h_u) * (1 if attention_T is None else attention_T[t])
            h_H = (1 - u) * h_H + u * torch.tanh(x_c + torch.sigmoid(x_r + h_r) * h_c)
            states.append(h_H)
    return torch.stack(states) if states else gate_XG.new_zeros(0, width) + 0 * weight_GH.sum()


def _in_time_order(place_RL: Tensor, num_events: int) -> tuple[Tensor, list[int]]:
    """Places of a chunk's events by time, [N], and how many rows have an event at each time."""
    place_LR = place_RL.t()
    is_event_LR = place_LR < num_events
    return place_LR[is_event_LR], is_event_LR.sum(dim=1).tolist()


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None
    ) -> Tensor:
        num_events, width = len(index_T), weight_GH.shape[1]
        state_TH = gate_XG.new_empty(num_events, width)
        weight_HG = weight_GH.t().contiguous()
        ctx.chunks = []
        # A step touches one event of each row: chunks bound the memory here, and with few rows steps cost their calls.
        event_bytes = -(-4 * width * gate_XG.element_size() // 64)
        for rows, place_RL in row_chunks(offsets_B1, num_events=num_events, event_bytes=event_bytes):
            place_N, counts = _in_time_order(place_RL, num_events)
            gate_NG = F.embedding(index_T[place_N], gate_XG)
            a_N1 = None if attention_T is None else attention_T[place_N, None]
            state_NH = gate_XG.new_empty(len(place_N), width)
            h_RH, begin = gate_XG.new_zeros(len(rows), width), 0
            for count in counts:
                step, h_RH = slice(begin, begin + count), h_RH[:count]
                x_RG, hidden_RG = gate_NG[step], h_RH @ weight_HG
                ur_RX = hidden_RG[:, : 2 * width].add_(x_RG[:, : 2 * width]).sigmoid_()
                u_RH, r_RH = ur_RX[:, :width], ur_RX[:, width:]
                candidate_RH = (r_RH * hidden_RG[:, 2 * width :]).add_(x_RG[:, 2 * width :]).tanh_()
                h_RH = torch.lerp(h_RH, candidate_RH, u_RH if a_N1 is None else u_RH * a_N1[step], out=state_NH[step])
                begin += count
            state_TH[place_N] = state_NH
            ctx.chunks.append((place_N, counts))
        ctx.save_for_backward(gate_XG, index_T, weight_GH, attention_T, state_TH)
        return state_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_state_TH: Tensor) -> tuple[Tensor | None, ...]:
        gate_XG, index_T, weight_GH, attention_T, state_TH = ctx.saved_tensors
        width = weight_GH.shape[1]
        g_gate_XG, g_weight_GH = torch.zeros_like(gate_XG), torch.zeros_like(weight_GH)
        g_attention_T = None if attention_T is None else torch.zeros_like(attention_T)
        for place_N, counts in ctx.chunks:
            first, counts_L = counts[0], torch.tensor(counts, device=place_N.device)
            # The state before each event: that of the same row one step earlier, which stands count places before.
            back_N = torch.repeat_interleave(counts_L[:-1], counts_L[1:])
            state_NH = state_TH[place_N]
            before_NH = torch.zeros_like(state_NH)
            before_NH[first:] = state_NH[torch.arange(first, len(place_N), device=place_N.device) - back_N]
            a_N1 = None if attention_T is None else attention_T[place_N, None]
            gate_NG, hidden_NG = F.embedding(index_T[place_N], gate_XG), before_NH @ weight_GH.t()
            ur_NX = torch.sigmoid(gate_NG[:, : 2 * width] + hidden_NG[:, : 2 * width])
            u_NH, r_NH, hidden_c_NH = ur_NX[:, :width], ur_NX[:, width:], hidden_NG[:, 2 * width :]
            candidate_NH = torch.tanh(gate_NG[:, 2 * width :] + r_NH * hidden_c_NH)
            update_NH = u_NH if a_N1 is None else u_NH * a_N1
            change_NH = candidate_NH - before_NH
            # What each gate's input gets is dh times these; all that is left for the loop is dh itself.
            by_candidate_NH = update_NH * (1 - candidate_NH.square())
            factor_N3H = torch.stack(
                [
                    change_NH * update_NH * (1 - u_NH),
                    by_candidate_NH * hidden_c_NH * r_NH * (1 - r_NH),
                    by_candidate_NH * r_NH,
                ],
                dim=1,
            )
            keep_NH, g_NH = 1 - update_NH, g_state_TH[place_N]
            carry_RH, end = None, len(place_N)
            for count in reversed(counts):
                step = slice(end - count, end)
                if carry_RH is not None:
                    g_NH[step][: len(carry_RH)] += carry_RH
                factor_R3H = factor_N3H[step].mul_(g_NH[step][:, None])
                carry_RH = torch.addcmul(factor_R3H.flatten(1) @ weight_GH, g_NH[step], keep_NH[step])
                end -= count
            g_weight_GH.addmm_(factor_N3H.flatten(1).t(), before_NH)
            if g_attention_T is not None:
                g_attention_T[place_N] = (g_NH * change_NH * u_NH).sum(dim=1)
            factor_N3H[:, 2] = by_candidate_NH * g_NH
            g_gate_XG.index_add_(0, index_T[place_N], factor_N3H.flatten(1))
        return g_gate_XG, None, g_weight_GH, None, g_attention_T
