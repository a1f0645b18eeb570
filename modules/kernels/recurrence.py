"""GRU with attentional update gate over jagged histories (DIEN, 1809.03672 section 4.3), and its plain twin.

Shape suffixes: see kernels/jagged.py; X distinct inputs, H width of the state, G = 3H gates (update, reset, candidate),
N events of a chunk ordered by time: all first events, then all second ones, …

Two rows with 2 and 1 events; the first input occurs in both::

    index_T   0 1 | 0        offsets_B1  0 2 3

>>> gate_XG, weight_GH = torch.randn(2, 9), torch.randn(9, 3)
>>> inputs = gate_XG, torch.tensor([0, 1, 0]), weight_GH, torch.tensor([0, 2, 3])
>>> state_TH = recurrence(*inputs)
>>> torch.allclose(state_TH, plain_recurrence(*inputs), atol=1e-6), torch.equal(state_TH[0], state_TH[2])
(True, True)
"""

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from lumrec.modules.kernels.jagged import row_chunks

STEP_BUFFERS = 12  # buffers of the width of a state that a step of the backward pass uses
tanh_backward, sigmoid_backward = torch.ops.aten.tanh_backward.grad_input, torch.ops.aten.sigmoid_backward.grad_input


def recurrence(
    gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None = None
) -> Tensor:
    """The state of each row after each of its events, [T, H]; before the first event it is zero::

        u, r = sigmoid(gate_ur + W_ur h)      h~ = tanh(gate_c + r * (W_c h))      h' = (1 - a u) h + a u h~

    gate_XG: the inputs, already multiplied by their weights and with the biases; event t reads row index_T[t], so that
    an input that occurs in many histories is multiplied once. weight_GH: W. attention_T: a; None means 1, a plain GRU
    (with DIEN's update gate, which is 1 - z of PyTorch's GRU).

    Each step of the loop over time computes the rows that still have an event, in chunks of rows whose buffers fit a
    CPU core's cache. Only the states are kept: the backward pass computes the gates again.
    """
    return _Recurrence.apply(gate_XG, index_T, weight_GH, offsets_B1, attention_T)


def plain_recurrence(
    gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None = None
) -> Tensor:
    """The same as `recurrence`, row by row and event by event in plain PyTorch: the reference in tests."""
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


def scanned_recurrence(gate_GLX: Tensor, weight_XH: Tensor, group_N: Tensor, attention_NL: Tensor) -> Tensor:
    """The same for N rows that share the inputs of G groups, all of L events, in a loop that torch.export takes.

    gate_GLX: the inputs. group_N: int64, the group of each row. attention_NL: a, 0 where a row's state stays as it is.
    Gives the states, [N, L, H]. Not for training. G, N and L must be at least 2: torch.export takes it that they are.
    """
    width = weight_XH.shape[1]

    def step(h_NH: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gate_NX, hidden_NX = inputs[0].index_select(0, group_N), h_NH @ weight_XH.t()
        ur_NX = torch.sigmoid(gate_NX[:, : 2 * width] + hidden_NX[:, : 2 * width])
        candidate_NH = torch.tanh(gate_NX[:, 2 * width :] + ur_NX[:, width:] * hidden_NX[:, 2 * width :])
        h_NH = torch.lerp(h_NH, candidate_NH, ur_NX[:, :width] * inputs[1][:, None])
        return h_NH, h_NH.clone()

    first_NH = gate_GLX.new_zeros(group_N.shape[0], width)
    inputs = gate_GLX.transpose(0, 1).contiguous(), attention_NL.t().contiguous()
    return scan(step, first_NH, inputs)[1].transpose(0, 1)


def _in_time_order(place_RL: Tensor, num_events: int) -> tuple[Tensor, list[int]]:
    """The places of a chunk's events ordered by time, [N], and how many rows have an event at each step."""
    place_LR = place_RL.t()
    is_event_LR = place_LR < num_events
    return place_LR[is_event_LR], is_event_LR.sum(dim=1).tolist()


class _Gates:
    """The gates, one step after another, in the same buffers, so that these stay in a CPU core's cache."""

    def __init__(self, gate_XG: Tensor, weight_GH: Tensor, num_rows: int) -> None:
        width = weight_GH.shape[1]
        self.gate_XG, self.width = gate_XG, width
        self.weight_ur_HX, self.weight_c_HH = weight_GH[: 2 * width].t(), weight_GH[2 * width :].t()
        self.gate_RG = gate_XG.new_empty(num_rows, 3 * width)
        self.hidden_c_RH, self.candidate_RH = gate_XG.new_empty(2, num_rows, width)

    def __call__(self, index_R: Tensor, h_RH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, r, W_c h and h~, each [R, H], from the rows' inputs and previous states; valid until the next call."""
        gate_RG = torch.index_select(self.gate_XG, 0, index_R, out=self.gate_RG[: len(index_R)])
        ur_RX = gate_RG[:, : 2 * self.width].addmm_(h_RH, self.weight_ur_HX).sigmoid_()
        u_RH, r_RH = ur_RX[:, : self.width], ur_RX[:, self.width :]
        hidden_c_RH = torch.mm(h_RH, self.weight_c_HH, out=self.hidden_c_RH[: len(index_R)])
        candidate_RH = self.candidate_RH[: len(index_R)]
        torch.addcmul(gate_RG[:, 2 * self.width :], r_RH, hidden_c_RH, out=candidate_RH).tanh_()
        return u_RH, r_RH, hidden_c_RH, candidate_RH


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_XG: Tensor, index_T: Tensor, weight_GH: Tensor, offsets_B1: Tensor, attention_T: Tensor | None
    ) -> Tensor:
        num_events, width = len(index_T), weight_GH.shape[1]
        state_TH = gate_XG.new_empty(num_events, width)
        ctx.chunks = []
        row_bytes = STEP_BUFFERS * width * gate_XG.element_size()
        for rows, place_RL in row_chunks(offsets_B1, num_events=num_events, row_bytes=row_bytes):
            place_N, counts = _in_time_order(place_RL, num_events)
            index_N = index_T[place_N]
            a_N1 = None if attention_T is None else attention_T[place_N, None]
            gates, state_NH = _Gates(gate_XG, weight_GH, len(rows)), gate_XG.new_empty(len(place_N), width)
            h_RH, begin = gate_XG.new_zeros(len(rows), width), 0
            for count in counts:
                step, h_RH = slice(begin, begin + count), h_RH[:count]
                u_RH, _, _, candidate_RH = gates(index_N[step], h_RH)
                update_RH = u_RH if a_N1 is None else u_RH.mul_(a_N1[step])
                h_RH = torch.lerp(h_RH, candidate_RH, update_RH, out=state_NH[step])
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
        g_attention_T = None if attention_T is None else torch.empty_like(attention_T)
        for place_N, counts in ctx.chunks:
            index_N, state_NH, g_NH = index_T[place_N], state_TH[place_N], g_state_TH[place_N]
            a_N1 = None if attention_T is None else attention_T[place_N, None]
            g_attention_N = g_NH.new_empty(len(place_N))
            gates = _Gates(gate_XG, weight_GH, counts[0])
            carry_RH, zeros_RH = gate_XG.new_zeros(2, counts[0], width)
            buffer_RX = gate_XG.new_empty(counts[0], 3 * width)
            buffers_RH = gate_XG.new_empty(2, counts[0], width)
            end = len(place_N)
            for count, count_before in zip(reversed(counts), [*reversed(counts[:-1]), 0], strict=True):
                step = slice(end - count, end)
                # Rows come longest first, so the rows of a step are the first rows of the step before.
                before = slice(step.start - count_before, step.start - count_before + count)
                h_RH = state_NH[before] if count_before else zeros_RH
                u_RH, r_RH, hidden_c_RH, candidate_RH = gates(index_N[step], h_RH)
                g_RH, (x_RH, y_RH) = g_NH[step].add_(carry_RH[:count]), buffers_RH[:, :count]
                g_gate_RG = buffer_RX[:count]
                g_u_RH, g_r_RH, g_c_RH = g_gate_RG.split(width, dim=1)
                # h' = h + a u (h~ - h): its gradients by h~, by h directly, and by u.
                torch.mul(g_RH, u_RH, out=x_RH)
                if a_N1 is not None:
                    x_RH.mul_(a_N1[step])
                torch.sub(g_RH, x_RH, out=carry_RH[:count])
                tanh_backward(x_RH, candidate_RH, grad_input=g_c_RH)
                torch.sub(candidate_RH, h_RH, out=y_RH).mul_(g_RH)
                if a_N1 is not None:
                    torch.sum(torch.mul(y_RH, u_RH, out=x_RH), dim=1, out=g_attention_N[step])
                    y_RH.mul_(a_N1[step])
                sigmoid_backward(y_RH, u_RH, grad_input=g_u_RH)
                sigmoid_backward(torch.mul(g_c_RH, hidden_c_RH, out=x_RH), r_RH, grad_input=g_r_RH)
                g_gate_XG.index_add_(0, index_N[step], g_gate_RG)
                g_c_RH.mul_(r_RH)  # from here on the gradients by W h
                carry_RH[:count].addmm_(g_gate_RG, weight_GH)
                g_weight_GH.addmm_(g_gate_RG.t(), h_RH)
                end -= count
            if g_attention_T is not None:
                g_attention_T[place_N] = g_attention_N
        return g_gate_XG, None, g_weight_GH, None, g_attention_T
