"""Search in long histories, and multi-head attention over the events found (SIM, 2006.05639; TWIN, 2302.02352).

Shape suffixes: see kernels/jagged.py; S events found for a row, H heads, K width of a head, X = K·H (head last).

Two rows with 4 and 1 events; the categories of the tokens are 0 or 1, and both targets have category 1::

    history_T    0 1 2 1 | 0        offsets_B1  0 4 5        category_U  0 1 1
    places       0 1 2 3 | 4        found       2 3 | none (5 is padding)

>>> history_T, offsets_B1 = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 4, 5])
>>> hard_search(torch.tensor([0, 1, 1]), torch.tensor([1, 2]), history_T, offsets_B1, num=2)
tensor([[2, 3],
        [5, 5]])
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.kernels.jagged import row_chunks, row_of_event

NUM_BUCKETS = 32  # of log_bucket: covers 136 years in seconds


def hard_search(category_U: Tensor, target_B: Tensor, history_T: Tensor, offsets_B1: Tensor, num: int) -> Tensor:
    """Places of each row's latest `num` events of its target's category, int64 [B, S], oldest first after padding (T).

    category_U: int64, of each token. target_B: int64, the token of each target (SIM section 3.2, hard search).
    """
    num_events, num_rows = len(history_T), len(target_B)
    row_T = row_of_event(offsets_B1, num_events)
    is_same_T = category_U[history_T] == category_U[target_B][row_T]
    seen_T1 = F.pad(is_same_T.cumsum(0), (1, 0))
    later_T = seen_T1[offsets_B1[1:]][row_T] - seen_T1[1:]  # later events of the category
    place_N = (is_same_T & (later_T < num)).nonzero().squeeze(1)
    width = int(later_T[place_N].max()) + 1 if len(place_N) else 0
    place_BS = history_T.new_full((num_rows, width), num_events)
    place_BS[row_T[place_N], width - 1 - later_T[place_N]] = place_N
    return place_BS


@torch.no_grad()
def top_search(
    score: Callable[[Tensor, Tensor], Tensor], offsets_B1: Tensor, *, num_events: int, event_bytes: int, num: int
) -> Tensor:
    """Places of each row's `num` events with the highest score, int64 [B, S], padded with T; ties go to later events.

    score: (rows [R], places [R, L] padded with T) → scores [R, L]; those of padding are not read. It is called for
    chunks of rows, which bounds the memory. event_bytes: what it gathers for one event. No gradient flows through it.
    """
    num_rows = len(offsets_B1) - 1
    longest = int(offsets_B1.diff().max()) if num_rows else 0
    found_BS = offsets_B1.new_full((num_rows, min(num, longest)), num_events)
    for rows, place_RL in row_chunks(offsets_B1, num_events=num_events, event_bytes=event_bytes):
        if place_RL.shape[1] > num:
            score_RL = score(rows, place_RL).masked_fill_(place_RL == num_events, -torch.inf)
            lowest_R1 = score_RL.topk(num, dim=1).values[:, -1:]
            above_RL, equal_RL = score_RL > lowest_R1, score_RL == lowest_R1
            from_end_RL = equal_RL.flip(1).cumsum(1).flip(1)
            left_R1 = num - above_RL.sum(dim=1, keepdim=True)
            place_RL = place_RL[above_RL | (equal_RL & (from_end_RL <= left_R1))].view(-1, num)
        found_BS[rows, : place_RL.shape[1]] = place_RL
    return found_BS


def shared_hard_search(is_same_GRL: Tensor, num: int) -> Tensor:
    """Places of the latest `num` events that are `is_same_GRL` for a row, int64 [G, R, S]: hard_search for Histories.

    The first `num` places of each history must be padding; it is found where there are fewer events.
    """
    from_end_GRL = is_same_GRL.flip(2).cumsum(2).flip(2)
    return _places(is_same_GRL & (from_end_GRL <= num), num - from_end_GRL, num)


def shared_top_search(score_GRL: Tensor, is_event_GL: Tensor, num: int) -> Tensor:
    """Places of each row's `num` events with the highest score, int64 [G, R, S]: top_search for Histories.

    The first `num` places of each history must be padding; it is found where there are fewer events.
    """
    score_GRL = score_GRL.masked_fill(~is_event_GL[:, None], -torch.inf)
    lowest_GR1 = score_GRL.topk(num, dim=2).values[:, :, -1:]
    above_GRL, equal_GRL = score_GRL > lowest_GR1, score_GRL == lowest_GR1
    from_end_GRL = equal_GRL.flip(2).cumsum(2).flip(2)
    is_found_GRL = above_GRL | (equal_GRL & (from_end_GRL <= num - above_GRL.sum(dim=2, keepdim=True)))
    return _places(is_found_GRL, is_found_GRL.cumsum(2) - 1, num)


def _places(is_found_GRL: Tensor, rank_GRL: Tensor, num: int) -> Tensor:
    """The places found, each at its rank below `num`; place 0, which is padding, where there is none."""
    rank_GRL = torch.where(is_found_GRL, rank_GRL, num)
    place_L = torch.arange(rank_GRL.shape[2], device=rank_GRL.device)
    place_GRS = rank_GRL.new_zeros(*rank_GRL.shape[:2], num + 1)
    return place_GRS.scatter(2, rank_GRL, place_L.expand_as(rank_GRL))[:, :, :num]


def plain_hard_search(
    category_U: Tensor, target_B: Tensor, history_T: Tensor, offsets_B1: Tensor, num: int
) -> list[list[int]]:
    """The places that `hard_search` finds, row by row in plain Python: the reference in tests."""
    found = []
    for target, start, end in zip(target_B.tolist(), offsets_B1[:-1].tolist(), offsets_B1[1:].tolist()):
        same = [t for t in range(start, end) if category_U[history_T[t]] == category_U[target]]
        found.append(same[-num:])
    return found


def plain_top_search(score_T: Tensor, offsets_B1: Tensor, num: int) -> list[list[int]]:
    """The places that `top_search` finds for a score of each event, row by row: the reference in tests."""
    return [
        sorted(sorted(range(start, end), key=lambda t: (float(score_T[t]), t))[-num:])
        for start, end in zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist())
    ]


def padded(values_T: Tensor, fill: float) -> Tensor:
    """The values of all events followed by `fill`, which the places of padding read: [T + 1]."""
    return F.pad(values_T, (0, 1), value=fill)


def log_bucket(x: Tensor) -> Tensor:
    """floor(log2(1 + x)), int64, at most NUM_BUCKETS - 1; NUM_BUCKETS for a negative x (padding).

    >>> log_bucket(torch.tensor([-1.0, 0.0, 1.0, 3.0, 1e30])).tolist()
    [32, 0, 1, 2, 31]
    """
    bucket = torch.log2(1 + x.float().clamp(min=0)).long().clamp(max=NUM_BUCKETS - 1)
    return bucket.masked_fill_(x < 0, NUM_BUCKETS)


def sum_by_bucket(weight_BHS: Tensor, bucket_BS: Tensor) -> Tensor:
    """The sum of each head's weights by the bucket of the event, [B, H, NUM_BUCKETS]; padding is left out."""
    sum_BHN = weight_BHS.new_zeros(*weight_BHS.shape[:2], NUM_BUCKETS + 1)
    return sum_BHN.scatter_add(2, bucket_BS[:, None].expand_as(weight_BHS), weight_BHS)[:, :, :NUM_BUCKETS]


def head_logits(query_BX: Tensor, key_BSX: Tensor, num_heads: int) -> Tensor:
    """q · k / sqrt(K) of each head, [B, S, H]."""
    query_BKH = query_BX.unflatten(1, (-1, num_heads))
    # A block-diagonal query serves all heads in one product, without a reordering of the keys.
    query_BXH = torch.diag_embed(query_BKH * query_BKH.shape[1] ** -0.5).flatten(1, 2)
    return torch.bmm(key_BSX, query_BXH)


def masked_softmax(logit_BSH: Tensor, is_event_BS: Tensor) -> Tensor:
    """Softmax over each row's events, [B, S, H]; 0 for padding and in rows without events."""
    weight_BSH = logit_BSH.masked_fill(~is_event_BS[:, :, None], -1e30).softmax(dim=1)
    return weight_BSH * is_event_BS[:, :, None]
