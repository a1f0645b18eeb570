"""Step 1's hot path: a training step of the LUM on flat packs, beside the same model written plainly.

    python benchmarks/pretrain.py [--events 4096] [--width 64] [--repeats 7]

Plain: every history padded to the longest allowed, attention and FFN on all places, the whole logit matrix through
F.cross_entropy, dense Adam over the tables. Both train the same number of events, of histories with ML-1M's lengths,
against the whole catalogue, with two tokens an event. The ratio within one run is what counts; machines differ.
"""

import argparse
import os
import platform
import statistics
import time

import torch
import torchrec
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.layout import make_layout
from lumrec.modules.losses import info_nce
from lumrec.modules.lum import LargeUserModel, Pack
from lumrec.modules.tokens import TokenEncoder, make_kjt, make_tables
from lumrec.modules.user_encoder import UserEncoder
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import init_distributed, shard

NUM_ITEMS, NUM_LAYERS, NUM_HEADS = 3900, 2, 2


class PlainLum(nn.Module):
    """The same network on padded batches, from PyTorch's stock modules."""

    def __init__(self, width: int, max_events: int) -> None:
        super().__init__()
        self.item = nn.Embedding(NUM_ITEMS, width)
        self.condition = nn.Embedding(4, 16)
        self.item_projection, self.condition_projection = nn.Linear(width, width), nn.Linear(16, width)
        self.position = nn.Embedding(2 * max_events, width)
        layer = nn.TransformerEncoderLayer(
            width, NUM_HEADS, 4 * width, 0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, NUM_LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, item_BL: Tensor, condition_BL: Tensor, target_BL: Tensor) -> Tensor:
        tokens = torch.stack(
            [self.condition_projection(self.condition(condition_BL)), self.item_projection(self.item(item_BL))], dim=2
        )
        x = tokens.flatten(1, 2)
        x = x + self.position.weight[: x.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.encoder(x, mask=causal, is_causal=True)[:, 0::2]
        logits = x @ self.item_projection(self.item.weight).t()
        return F.cross_entropy(logits.flatten(0, 1), target_BL.flatten(), ignore_index=-1)


def draw_lengths(num_events: int, max_events: int) -> Tensor:
    """Log-normal lengths with ML-1M's median (96) and mean (166), cut at `max_events`, as windows of training are."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < num_events:
        length = int(torch.exp(4.56 + 1.05 * torch.randn((), generator=generator)))
        lengths.append(max(1, min(length, max_events, num_events - sum(lengths))))
    return torch.tensor(lengths)


def lumrec_step(item_T: Tensor, condition_T: Tensor, lengths_B: Tensor, width: int, max_events: int):
    tables = make_tables({"item": (NUM_ITEMS, width), "condition": (4, 16)}, {"item": "item", "condition": "condition"})
    model = LargeUserModel(
        TokenEncoder(tables, item_features=["item"], condition_features=["condition"], dim=width),
        UserEncoder(dim=width, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, max_tokens=2 * max_events, dropout=0.1),
        dim=width,
        similarity="dot",
    )
    config = OptimizerConfig()
    dmp = shard(model, optimizer=config, device=init_distributed("cpu"))
    optimizer = build_optimizer(dmp, config)
    num_events, none = len(item_T), torch.zeros(0, dtype=torch.int64)
    one, zero = torch.ones, torch.zeros
    columns = {
        "item": (torch.cat([item_T, torch.arange(NUM_ITEMS)]), one(num_events + NUM_ITEMS).long()),
        "condition": (condition_T, torch.cat([one(num_events), zero(NUM_ITEMS)]).long()),
    }

    def step() -> None:
        pack = Pack(
            tokens=make_kjt(model.token_encoder.features, columns, stride=num_events + NUM_ITEMS),
            layout=make_layout(2 * lengths_B),
            num_events=num_events,
            num_queries=0,
            num_candidates=NUM_ITEMS,
            query_prefix_Q=none,
            previous_T=torch.arange(num_events) - 1,  # not read: two tokens an event, no bias of time
            previous_Q=none,
            time_T=torch.zeros(num_events, dtype=torch.int64),
            time_Q=none,
            candidate_item_C=torch.arange(NUM_ITEMS),
            positive_T=item_T,
            log_weight_C=torch.zeros(NUM_ITEMS),
            log_positive_weight_T=torch.zeros(0),
            contrast_event_Q=none,
            event_row_T=none,
        )
        optimizer.zero_grad()
        o_TD, _, e_CD = dmp(pack)
        (info_nce(o_TD, e_CD, pack.positive_T) / num_events).backward()
        optimizer.step()

    return step


def plain_step(item_T: Tensor, condition_T: Tensor, lengths_B: Tensor, width: int, max_events: int):
    model = PlainLum(width, max_events)
    optimizer = torch.optim.Adam(model.parameters())
    real = torch.arange(max_events) < lengths_B[:, None]

    def padded(values_T: Tensor, fill: int) -> Tensor:
        batch = torch.full(real.shape, fill)
        batch[real] = values_T
        return batch

    batch = padded(item_T, 0), padded(condition_T, 0), padded(item_T, -1)

    def step() -> None:
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()

    return step


def measure(step, repeats: int) -> list[float]:
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=4096, help="events of one step (default 4096)")
    parser.add_argument("--max-events", type=int, default=128, help="longest history in events (default 128)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    lengths_B = draw_lengths(args.events, args.max_events)
    inputs = torch.randint(1, NUM_ITEMS, (args.events,)), torch.randint(1, 4, (args.events,)), lengths_B
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads;", end=" ")
    print(f"torch {torch.__version__}, torchrec {torchrec.__version__}")
    fill = args.events / (len(lengths_B) * args.max_events)
    print(f"{args.events} events of {len(lengths_B)} users ({fill:.0%} of the padded places), width {args.width}")
    print(f"{'':24}{'median s':>10}{'min':>8}{'max':>8}{'events/s':>12}   (3 warm-up, {args.repeats} timed)")
    medians = {}
    for name, make in (("plain, padded", plain_step), ("lumrec, flat packs", lumrec_step)):
        times = measure(make(*inputs, args.width, args.max_events), args.repeats)
        medians[name] = statistics.median(times)
        row = f"{name:24}{medians[name]:10.3f}{min(times):8.3f}{max(times):8.3f}{args.events / medians[name]:12,.0f}"
        print(row)
    plain, ours = medians.values()
    print(f"lumrec takes {ours / plain:.2f} of the plain model's time")


if __name__ == "__main__":
    main()
