"""A LUM as files that torch runs without lumrec: its answers to conditions after users' last events (step 2).

    lum.pt2       operators and dense weights (graph.py)
    lum.json      what it reads
    tables/       its embedding tables, which are inputs of the graph (tables.py)
    items.npy     embeddings of all items, to be multiplied with the answers
    golden.npz    inputs and answers of some users, checked when the files are opened

Histories are padded, tokens and queries of a user are one sequence; the mask is that of attention.py::

    c1 i1 c2 i2 .. .. | a  b      user with two of three events: a and b see c1 i1 c2 i2 and themselves

Shape suffixes: T events of all users, B users, L events of the longest history, N conditions, D width, M padded tokens,
S = M + N, I items, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.hstu import HstuBlock
from lumrec.modules.large_user_model import TOKENS_PER_EVENT, LargeUserModel, Pack
from lumrec.modules.relative_bias import RelativeBias, time_bucket
from lumrec.query.group_query import GroupQuery, serving_windows
from lumrec.query.prefix_cache import plain_lum
from lumrec.run.files import write_atomically
from lumrec.serving.bundle import MANIFEST, version_of
from lumrec.serving.golden_vectors import check_golden_vectors, write_golden_vectors
from lumrec.serving.graph import Inputs, export_module, padded, read_spec, without
from lumrec.serving.graph_file import read_graph
from lumrec.serving.tables import TableDtype, bags, embedded, open_tables, write_tables

GOLDEN_USERS = 20


@dataclass(frozen=True)
class LumSpec:
    """What an exported LUM reads. tables: feature → table. tokens, times: see LargeUserModel and UserEncoder.time_bias.

    max_events: the longest history, without the queries. dtype: of the tables.
    """

    item_features: list[str]
    condition_features: list[str]
    tables: dict[str, str]
    tokens: str
    times: bool
    max_events: int
    dtype: TableDtype

    @classmethod
    def of(cls, query: GroupQuery, dtype: TableDtype = "float32") -> LumSpec:
        """That of the LUM of a group query, whose tables will have this dtype."""
        lum, features = plain_lum(query), query.data.schema.features
        item, condition = lum.token_encoder.item_features, lum.token_encoder.condition_features
        return cls(
            item_features=item,
            condition_features=condition,
            tables={name: features[name].table for name in [*item, *condition]},
            tokens=lum.tokens,
            times=lum.user_encoder.time_bias,
            max_events=query.max_events - 1,
            dtype=dtype,
        )


class LumGraph(nn.Module):
    """A LUM over plain tensors, with its tables as inputs: answers [B, N, D], float32. inputs: of `lum_inputs`."""

    def __init__(self, lum: LargeUserModel, spec: LumSpec) -> None:
        super().__init__()
        if lum.training:
            raise ValueError("the LUM is in training mode, and what is served is not: call eval() first")
        self.lum, self.spec = without(lum, "token_encoder"), spec
        self.token_encoder = without(lum.token_encoder, "tables")

    def forward(self, inputs: Inputs, tables: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        event_BL, query_BN, encoder = inputs["event_BL"], inputs["query_BN"], self.lum.user_encoder
        item_TD, condition_XD = self._projected(inputs, tables, scales)
        num_events, dim = item_TD.shape
        length_B = (event_BL < num_events).sum(1)
        item_BLD = F.embedding(event_BL, F.pad(item_TD, (0, 0, 0, 1)))
        condition_BLD = F.embedding(event_BL, F.pad(condition_XD[:num_events], (0, 0, 0, 1)))
        y_BND = F.embedding(query_BN, condition_XD[num_events:])
        if self.lum.start_D is None:
            x_BMD = torch.stack([condition_BLD, item_BLD], dim=2).flatten(1, 2)
        else:  # each token has the item before it
            start_B1D = self.lum.start_D.expand(event_BL.shape[0], 1, -1)
            known_BD = torch.cat([start_B1D, item_BLD], dim=1)
            x_BMD = known_BD[:, :-1] + condition_BLD
            y_BND = y_BND + known_BD.gather(1, length_B[:, None, None].expand(-1, 1, dim))
        num_tokens, place_S = x_BMD.shape[1], torch.arange(x_BMD.shape[1] + y_BND.shape[1])
        prefix_B1 = length_B[:, None] * TOKENS_PER_EVENT[self.spec.tokens]
        position_BS = torch.where(place_S < num_tokens, place_S, prefix_B1)
        seen_BSS = torch.where(
            (place_S < num_tokens)[:, None],
            place_S <= place_S[:, None],
            (place_S < prefix_B1[:, None]) | (place_S == place_S[:, None]),
        )
        bucket_BSS = self._time_buckets(inputs, length_B) if self.spec.times else None
        x_XD, rotary = encoder.placed(torch.cat([x_BMD, y_BND], dim=1).flatten(0, 1), position_BS.flatten())
        for block, bias in zip(encoder.blocks, encoder.biases, strict=True):
            bias_BHSS = _bias(bias, position_BS, bucket_BSS) if isinstance(bias, RelativeBias) else None
            silu_over = encoder.max_tokens if isinstance(block, HstuBlock) else 0
            attend = partial(_attended, seen_BSS=seen_BSS, bias_BHSS=bias_BHSS, silu_over=silu_over)
            x_XD = block(x_XD, attend, slice(None), rotary)
        o_BSD = encoder.norm(x_XD).view(*position_BS.shape, dim)
        return self.lum._scaled(self.lum.output(o_BSD[:, num_tokens:])).float()

    def _projected(
        self, inputs: Inputs, tables: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Items of the events [T, D], and conditions of the events, then of the queries."""
        sources, encoder = (inputs, self.spec.tables, tables, scales), self.token_encoder
        item_TD = encoder.item_projection(embedded(self.spec.item_features, *sources))
        if not self.spec.condition_features:
            num = item_TD.shape[0] + inputs["query_BN"].numel()
            return item_TD, encoder.condition_constant_D.expand(num, -1)
        return item_TD, encoder.condition_projection(embedded(self.spec.condition_features, *sources))

    def _time_buckets(self, inputs: Inputs, length_B: Tensor) -> Tensor:
        """The bucket of the time from each token to each other one, int64 [B, S, S] (see TokenTimes)."""
        time_BL, query_BN = inputs["time_BL"], inputs["query_BN"]
        asked_BN = inputs["time_B"][:, None].expand_as(query_BN)
        if self.lum.start_D is None:
            seen_BL, seen_BN = time_BL, asked_BN
        else:  # a token has the item of the event before; the first one counts as seen when asked
            last_B1 = time_BL.gather(1, (length_B - 1).clamp(min=0)[:, None])
            seen_BL = torch.cat([time_BL[:, :1], time_BL[:, :-1]], dim=1)
            seen_BN = torch.where(length_B[:, None] > 0, last_B1, asked_BN)
        repeats = TOKENS_PER_EVENT[self.spec.tokens]
        asked_BS = torch.cat([time_BL.repeat_interleave(repeats, 1), asked_BN], dim=1)
        seen_BS = torch.cat([seen_BL.repeat_interleave(repeats, 1), seen_BN], dim=1)
        return time_bucket(asked_BS[:, :, None] - seen_BS[:, None]).long()


def _bias(bias: RelativeBias, position_BS: Tensor, bucket_BSS: Tensor | None) -> Tensor:
    """Added to the scores of all heads, [B, 1, S, S]."""
    bias_BSS = bias.distance_M[(position_BS[:, :, None] - position_BS[:, None]).clamp(min=0)]
    if bias.time_N is not None and bucket_BSS is not None:
        bias_BSS = bias_BSS + bias.time_N[bucket_BSS]
    return bias_BSS[:, None]


def _attended(
    q_XHK: Tensor, k_XHK: Tensor, v_XHK: Tensor, *, seen_BSS: Tensor, bias_BHSS: Tensor | None, silu_over: int
) -> Tensor:
    """Attention over what each token sees, [X, H, K]: the plain form of attention.py."""
    q, k, v = (x.view(*seen_BSS.shape[:2], *x.shape[1:]).transpose(1, 2) for x in (q_XHK, k_XHK, v_XHK))
    score_BHSS = q @ k.transpose(2, 3) * (1.0 if silu_over else q.shape[-1] ** -0.5)
    if bias_BHSS is not None:
        score_BHSS = score_BHSS + bias_BHSS
    hidden = ~seen_BSS[:, None]
    if silu_over:
        weight_BHSS = F.silu(score_BHSS).masked_fill(hidden, 0.0) / silu_over
    else:
        weight_BHSS = score_BHSS.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weight_BHSS @ v).transpose(1, 2).flatten(0, 1)


def lum_inputs(pack: Pack, spec: LumSpec) -> Inputs:
    """The tensors that an exported LUM reads for the pack's histories and queries, by name, on the CPU.

    Raises ValueError where not every user is asked the same number of queries, one or more, after the last event.
    """
    per_event, num_events = TOKENS_PER_EVENT[spec.tokens], pack.num_events
    length_B = pack.layout.offsets_B1.diff() // per_event
    queries_B = pack.layout.query_offsets_B1.diff()
    num = int(queries_B.max()) if len(queries_B) else 0
    after_Q = (per_event * length_B).repeat_interleave(queries_B)
    if not num or not bool((queries_B == num).all()) or not torch.equal(pack.query_prefix_Q, after_Q):
        raise ValueError("an exported LUM is asked the same number of queries of each user, after the last event")
    inputs = bags(pack.tokens, num_events, spec.item_features, [])
    inputs |= bags(pack.tokens, num_events + pack.num_queries, spec.condition_features, [])
    inputs["event_BL"] = padded(torch.arange(num_events), length_B.numpy(), num_events)
    inputs["query_BN"] = torch.arange(pack.num_queries).view(-1, num)
    if spec.times:
        inputs["time_BL"] = padded(pack.time_T, length_B.numpy(), 0)
        inputs["time_B"] = pack.time_Q.view(-1, num)[:, 0]
    return inputs


def export_lum(query: GroupQuery, folder: str | Path, *, dtype: TableDtype = "float32") -> LumSpec:
    """Writes the LUM of a group query, with some of its answers, into a folder.

    dtype: of the tables. Each call may have as many users, events and conditions as one likes. Raises UserError where
    the files do not give the LUM's answers.
    """
    folder, lum, spec = Path(folder), plain_lum(query), LumSpec.of(query, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder / "tables", lum.token_encoder.tables, dtype=dtype)
    widths = {table: query.data.schema.tables[table].width for table in spec.tables.values()}
    export_module(LumGraph(lum, spec), _example(spec, widths), folder / "lum.pt2")
    write_atomically(folder / "lum.json", json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    by_length = np.argsort(np.diff(query.data.user_offsets), kind="stable")
    user_B = torch.from_numpy(by_length[np.linspace(0, len(by_length) - 1, GOLDEN_USERS).astype(int)])
    windows = serving_windows(query.data, user_B, max_events=query.max_events)
    golden = lum_inputs(query.pack(windows, query.asked, torch.arange(len(user_B))), spec)
    write_golden_vectors(folder, golden, {"o_BND": query.users(user_B)}, query.items())
    ExportedLum(folder)
    return spec


def _example(spec: LumSpec, widths: Mapping[str, int]) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Arguments for the graph, with sizes that are primes which no one chooses (see graph.py)."""
    num_users, longest, num_queries, num_events, num_more = 13, 31, 7, 113, 17
    inputs = {}
    for names, num_bags in (
        (spec.item_features, num_events),
        (spec.condition_features, num_events + num_users * num_queries),
    ):
        for name in names:
            inputs[f"values:{name}"] = torch.zeros(num_bags + num_more, dtype=torch.int64)
            inputs[f"offsets:{name}"] = F.pad(torch.arange(num_bags), (0, 1), value=num_bags + num_more)
    inputs["event_BL"] = torch.arange(num_users * longest).view(num_users, longest) % num_events
    inputs["query_BN"] = torch.arange(num_users * num_queries).view(num_users, num_queries)
    if spec.times:
        inputs["time_BL"], inputs["time_B"] = torch.zeros_like(inputs["event_BL"]), torch.arange(num_users)
    tables = {table: torch.zeros(139, width, dtype=getattr(torch, spec.dtype)) for table, width in widths.items()}
    return inputs, tables, {name: torch.ones(139) for name in tables} if spec.dtype == "int8" else {}


class ExportedLum:
    """An exported LUM, opened: `lum(inputs)` gives the answers o_BND, float32, on the CPU.

    folder: a bundle that lumrec export wrote, or what `export_lum` did. inputs: of `lum_inputs`. items_ID: embeddings
    of all items; similarity to an answer is the dot product. Raises MissingFileError or UserError where a file is
    missing or damaged, or the golden answers do not come out.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            folder = version_of(folder, "LUM")
        self.tables = open_tables(folder / "tables")
        self.spec, self._run = read_spec(folder / "lum.json", LumSpec, self.tables), read_graph(folder / "lum.pt2")
        self.items_ID, self.golden_difference = check_golden_vectors(
            folder, "the LUM", self.spec.dtype, lambda inputs: {"o_BND": self(inputs)}
        )

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        o_BND: Tensor = self._run(inputs, *self.tables)
        return o_BND
