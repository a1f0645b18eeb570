"""Step 1 on a log that is drawn: LUM's training step as `pretrain` takes it, and a plain twin of it.

Shape suffixes: U users, E events of the log, B windows of a pack, L places of a padded batch, T events of a pack.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from _measure import Timeline
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.packs import PackingConfig, PackLoader
from lumrec.batches.windows import Windows, training_windows
from lumrec.data.columns import Column, expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig, validate
from lumrec.data.splits import TRAIN
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.modules import user_encoder
from lumrec.modules.large_user_model import TOKENS_PER_EVENT, Pack
from lumrec.modules.relative_bias import bias_indices
from lumrec.stages.pretrain import PRECISIONS, PretrainConfig, make_step
from lumrec.train.optimizers import build_optimizer, clip_grad_norm
from lumrec.train.parallel import shard

CONDITION_ROWS, CONDITION_WIDTH = 4, 16
PARTS = ("data", "lookup", "projection", "attention", "blocks", "loss", "optimizer", "other")


def log_normal(count: int, *, median: float, sigma: float) -> np.ndarray:
    """`count` lengths of at least 1."""
    return np.exp(np.random.default_rng(0).normal(np.log(median), sigma, count)).astype(np.int64).clip(1)


def drawn_log(lengths_U: np.ndarray, *, num_items: int, width: int) -> PreparedData:
    """A prepared log as it lies in memory: an item id (a table of `width`) and one condition of each event.

    The most popular tenth of the items has 40% of the events, as in MovieLens-1M; gaps of time are long-tailed.
    """
    random, num_events, num_users = np.random.default_rng(1), int(lengths_U.sum()), len(lengths_U)
    schema = validate(
        SchemaConfig(
            tables={"item_id": TableConfig(width), "feedback": TableConfig(CONDITION_WIDTH)},
            features={"item_id": FeatureConfig("item"), "feedback": FeatureConfig("condition")},
        )
    )
    item_E = (num_items * random.random(num_events) ** 2.5).astype(np.int64)
    log = PreparedData.__new__(PreparedData)  # without a folder
    vars(log).update(
        schema=schema,
        table_rows={"item_id": num_items + 1, "feedback": CONDITION_ROWS},
        num_users=num_users,
        num_items=num_items,
        num_events=num_events,
        user_offsets=np.concatenate([[0], lengths_U.cumsum()]),
        user=np.repeat(np.arange(num_users), lengths_U),
        item=item_E,
        timestamp=np.exp(random.normal(6, 2, num_events)).cumsum().astype(np.int64),
        split=np.full(num_events, TRAIN, dtype=np.int8),
        item_columns={"item_id": Column(torch.arange(1, num_items + 1))},
        event_columns={"feedback": Column(torch.from_numpy(random.integers(1, CONDITION_ROWS, num_events)))},
    )
    return log


class LumTraining:
    """A fresh LUM, its optimizer and its loader, as `lumrec.stages.pretrain` puts them together.

    windows: those of the one pack that every step is trained on (made again each time), shuffled and as many as a pack
    of `events` takes, so that repeats differ only by the machine.
    """

    def __init__(
        self, log: PreparedData, model: ModelConfig, *, events: int, full: bool, precision: str = "float32"
    ) -> None:
        """full: InfoNCE over the whole catalogue, else in the batch and 1024 sampled."""
        settings = PretrainConfig(
            packing=PackingConfig(events_per_pack=events, condition_dropout=0.0),
            negatives=NegativesConfig(full=full, sampled=1024),
            precision=precision,
        )
        torch.manual_seed(0)
        self.lum, builder = build_lum(model, log)
        self.clip = settings.train.optimizer.clip_grad_norm
        self.dmp = shard(self.lum, optimizer=settings.train.optimizer, device="cpu")
        self.optimizer = build_optimizer(self.dmp, settings.train.optimizer)
        self.loader = PackLoader(
            builder,
            users=np.ones(log.num_users, dtype=bool),
            max_events=model.max_events,
            packing=settings.packing,
            negatives=settings.negatives,
        )
        self.loss = make_step(settings)
        generator = torch.Generator().manual_seed(0)
        windows = training_windows(log, max_events=model.max_events, users=self.loader.users, generator=generator)
        windows = windows[torch.randperm(windows.count, generator=generator)]
        self.windows = windows[windows.length_W.cumsum(0) - windows.length_W < events]
        self.num_events = int(self.windows.length_W.sum())

    def pack(self) -> Pack:
        """The pack, put together from the log."""
        return self.loader.training_pack(self.windows, torch.Generator().manual_seed(0))

    def step(self) -> None:
        """Data, forward, backward, optimizers."""
        pack = self.pack()
        self.optimizer.zero_grad(set_to_none=True)
        output = self.loss(self.dmp, pack)
        (output.loss_sum / pack.num_events).backward()
        clip_grad_norm(self.optimizer.dense_parameters, self.clip)
        self.optimizer.step()

    def parts(self) -> dict[str, float]:
        """The same step: processor seconds of each of PARTS."""
        with self._marked() as timeline:
            timeline.enter("data")
            pack = self.pack()
            timeline.enter("other")
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(self.dmp, pack).loss_sum / pack.num_events
            timeline.entered_after_backward("other", loss)
            loss.backward()
            timeline.enter("optimizer")
            clip_grad_norm(self.optimizer.dense_parameters, self.clip)
            self.optimizer.step()
            timeline.enter("other")
        return {part: timeline.seconds[part] for part in PARTS}

    @contextlib.contextmanager
    def _marked(self) -> Iterator[Timeline]:
        """A timeline with borders between the parts of the model."""
        timeline, lum = Timeline(), self.lum
        blocks, tables = lum.user_encoder.blocks, lum.token_encoder.tables

        def looked_up(module: nn.Module, args: object, output: object) -> object:
            pooled = output.wait()  # type: ignore[attr-defined]
            (values,) = timeline.border("lookup", "projection", pooled.values())
            return type(pooled)(pooled.keys(), pooled.length_per_key(), values)

        def indexed(*args: Any, **kwargs: Any) -> object:  # of the bias of position and time
            timeline.enter("attention")
            indices = bias_indices(*args, **kwargs)
            timeline.enter("other")
            return indices

        hooks = [
            tables.register_forward_pre_hook(lambda module, args: timeline.enter("lookup")),
            tables.register_forward_hook(looked_up),
            lum.token_encoder.register_forward_hook(lambda m, args, out: timeline.border("projection", "other", *out)),
            blocks[0].register_forward_pre_hook(
                lambda m, args: (*timeline.border("other", "blocks", args[0]), *args[1:])
            ),
            lum.user_encoder.register_forward_hook(lambda m, args, out: timeline.border("blocks", "other", *out)),
            lum.register_forward_hook(lambda m, args, out: type(out)(*timeline.border("other", "loss", *out))),
        ]
        try:
            with (
                mock.patch.object(user_encoder, "bias_indices", indexed),
                timeline.within(user_encoder, "_attend", "attention", "blocks"),
            ):
                yield timeline
        finally:
            for hook in hooks:
                hook.remove()


class PlainTraining:
    """What one writes first, on the same pack, with the same network.

    Every window padded to the same length, attention and FFN on all places, PyTorch's stock transformer, the whole
    logit matrix through F.cross_entropy, dense Adam for tables and all. longest: pad to so many events; 0 = to the
    longest window of the pack.
    """

    def __init__(
        self, log: PreparedData, model: ModelConfig, windows: Windows, *, longest: int, precision: str = "float32"
    ) -> None:
        torch.manual_seed(0)
        self.network = PlainLum(log.num_items, model)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.item_E, self.condition_E = torch.from_numpy(log.item), log.event_columns["feedback"].values
        self.windows, self.longest = windows, longest or int(windows.length_W.max())
        self.dtype = PRECISIONS[precision]

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        row_T = expand_ranges(self.windows.start_W, self.windows.length_W)
        real_BL = torch.arange(self.longest) < self.windows.length_W[:, None]

        def padded(values_T: Tensor, fill: int) -> Tensor:
            batch_BL = torch.full(real_BL.shape, fill)
            batch_BL[real_BL] = values_T
            return batch_BL

        item_T, condition_T = self.item_E[row_T], self.condition_E[row_T]
        return padded(item_T, 0), padded(condition_T, 0), padded(item_T, -1)

    def step(self) -> None:
        batch = self._batch()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.network(*batch)
        loss.backward()
        self.optimizer.step()

    def parts(self) -> dict[str, float]:
        """The same step: processor seconds of each of PARTS."""
        timeline = self.network.timeline = Timeline()
        with timeline.within(F, "scaled_dot_product_attention", "attention", "blocks"):
            timeline.enter("data")
            batch = self._batch()
            timeline.enter("other")
            self.optimizer.zero_grad()
            loss = self.network(*batch)
            loss.backward()
            timeline.enter("optimizer")
            self.optimizer.step()
            timeline.enter("other")
        self.network.timeline = None
        return {part: timeline.seconds[part] for part in PARTS}


class PlainLum(nn.Module):
    """The same network (a GPT-style encoder, dot similarity) on padded batches, from PyTorch's stock modules."""

    def __init__(self, num_items: int, config: ModelConfig) -> None:
        super().__init__()
        width, self.merged = config.dim, config.tokens == "merged"
        self.item, self.condition = nn.Embedding(num_items, width), nn.Embedding(CONDITION_ROWS, CONDITION_WIDTH)
        self.item_projection, self.condition_projection = nn.Linear(width, width), nn.Linear(CONDITION_WIDTH, width)
        self.position = nn.Embedding(TOKENS_PER_EVENT[config.tokens] * config.max_events, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # LUM has none there either; it would take the whole matrix of scores
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.output = nn.Linear(width, width)
        self.timeline: Timeline | None = None

    def _border(self, before: str, after: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors if self.timeline is None else self.timeline.border(before, after, *tensors)

    def forward(self, item_BL: Tensor, condition_BL: Tensor, target_BL: Tensor) -> Tensor:
        if self.timeline is not None:
            self.timeline.enter("lookup")
        found = self._border("lookup", "projection", self.item(item_BL), self.condition(condition_BL), self.item.weight)
        item, condition, catalogue = found
        item, condition = self.item_projection(item), self.condition_projection(condition)
        catalogue_ID = self.item_projection(catalogue)
        item, condition, catalogue_ID = self._border("projection", "other", item, condition, catalogue_ID)
        if self.merged:
            x = condition + F.pad(item[:, :-1], (0, 0, 1, 0))
        else:
            x = torch.stack([condition, item], dim=2).flatten(1, 2)
        (x,) = self._border("other", "blocks", x + self.position.weight[: x.shape[1]])
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        (x,) = self._border("blocks", "other", self.encoder(x, mask=causal, is_causal=True))
        o_BLD = self.output(x if self.merged else x[:, 0::2])
        o_BLD, catalogue_ID = self._border("other", "loss", o_BLD, catalogue_ID)
        logits = o_BLD @ catalogue_ID.t()
        return F.cross_entropy(logits.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-1)
