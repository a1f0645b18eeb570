"""Token encoder: embedding tables, concatenation, one linear projection per token type (LUM section 4.1.2).

Shape suffixes: S bags (stride), E width of a table, T events, Q query conditions, C candidate items, D model width,
X tokens of one type.

Two events and one query. Each is one bag of every feature; the query has only a condition::

    bag      0          1          2
    item     5          6          (empty)
    wish     1          2          2

>>> tables = make_tables({"item": (9, 4), "wish": (3, 4)}, {"item": "item", "wish": "wish"})
>>> encoder = TokenEncoder(tables, item_features=["item"], condition_features=["wish"], dim=8)
>>> tokens = kjt_from_lists(encoder.features, [{"item": 5, "wish": 1}, {"item": 6, "wish": 2}, {"wish": 2}])
>>> item_XD, condition_XD = encoder(tokens, num_events=2, num_queries=1)
>>> tuple(item_XD.shape), tuple(condition_XD.shape)
((2, 8), (3, 8))
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Bags = Mapping[str, int | Sequence[int]]  # one token: feature -> a row of its table, or several rows


def make_tables(
    tables: Mapping[str, tuple[int, int]],
    features: Mapping[str, str],
    *,
    device: torch.device | str | None = None,
) -> EmbeddingBagCollection:
    """The embedding tables as one EmbeddingBagCollection with mean pooling.

    tables: name -> (rows, width); row 0 is "unknown". features: feature -> name of its table; features can share one.
    Tables that no feature reads are left out. Raises ValueError for a feature whose table is not declared.

    Rows are initialised uniformly in ±1/sqrt(width), so that vectors have the same length in tables of any size. Row 0
    is initialised to zero, like an empty bag: no gradient reaches it if the vocabulary covers the training data.

    >>> tables = make_tables({"genre": (19, 8)}, {"genres": "genre", "main_genre": "genre"})
    >>> [config.feature_names for config in tables.embedding_bag_configs()]
    [['genres', 'main_genre']]
    """
    missing = sorted(set(features.values()) - set(tables))
    if missing:
        raise ValueError(f"features name tables that are not declared: {missing}; declared are {sorted(tables)}")
    configs = []
    for name, (rows, width) in tables.items():
        readers = [feature for feature, table in features.items() if table == name]
        if not readers:
            continue

        def init(weight: Tensor, bound: float = width**-0.5) -> Tensor:
            nn.init.uniform_(weight, -bound, bound)
            with torch.no_grad():
                weight[:1] = 0.0
            return weight

        configs.append(
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=width,
                feature_names=readers,
                pooling=PoolingType.MEAN,
                init_fn=init,
            )
        )
    return EmbeddingBagCollection(tables=configs, device=torch.device(device or "cpu"))


def feature_widths(tables: EmbeddingBagCollection) -> dict[str, int]:
    """The embedding width of each feature, in the order of `feature_order`."""
    return {name: config.embedding_dim for config in tables.embedding_bag_configs() for name in config.feature_names}


def table_of_features(tables: EmbeddingBagCollection) -> dict[str, str]:
    """The name of each feature's table, in the order of `feature_order`."""
    return {name: config.name for config in tables.embedding_bag_configs() for name in config.feature_names}


def feature_order(tables: EmbeddingBagCollection) -> list[str]:
    """The order of KJT keys with which these tables are always called.

    A sharded EmbeddingBagCollection keeps the order of its first call and reads wrong rows for any other order.
    """
    return list(feature_widths(tables))


def check_keys(tokens: KeyedJaggedTensor, features: list[str]) -> None:
    """Raises ValueError if the keys of `tokens` are not `features`, in this order (see `feature_order`)."""
    if tokens.keys() != features:
        raise ValueError(f"the batch has the keys {tokens.keys()}; these tables are called with {features} only")


def guard_key_order(model: nn.Module) -> None:
    """Makes each sharded embedding module in `model` raise ValueError if its keys differ from those of its first call.

    Otherwise such a module silently reads wrong rows: it keeps the key order of the first KeyedJaggedTensor. Call this
    once, after DistributedModelParallel, especially if two models share tables. Modules that are not sharded look
    features up by name and need no guard.
    """
    from torchrec.distributed.types import ShardedModule

    for name, module in model.named_modules():
        if isinstance(module, ShardedModule):
            module.register_forward_pre_hook(_KeyOrder(name))


class _KeyOrder:
    """A hook that remembers the keys of the first call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: list[str] | None = None

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        keys = next((arg.keys() for arg in args if isinstance(arg, KeyedJaggedTensor)), None)
        self.keys = self.keys or keys
        if keys != self.keys:
            raise ValueError(
                f"{self.name or type(module).__name__} was first called with the keys {self.keys} and now with {keys}: "
                "a sharded collection keeps the first order and would read wrong rows; permute the KeyedJaggedTensor"
            )


def make_kjt(
    features: Sequence[str], columns: Mapping[str, tuple[Tensor, Tensor]], *, stride: int
) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor with the keys `features`, in this order, and `stride` bags for each.

    columns: feature -> (values int64, lengths int64 [stride]); a feature that is not given has empty bags.
    Raises ValueError for a column that is not in `features` or does not have `stride` bags.

    >>> kjt = make_kjt(["item_id", "genres"], {"genres": (torch.tensor([3, 4, 5]), torch.tensor([2, 1]))}, stride=2)
    >>> kjt.lengths().tolist()
    [0, 0, 2, 1]
    """
    unknown = sorted(set(columns) - set(features))
    if unknown:
        raise ValueError(f"these tables have no features {unknown}; their features are {list(features)}")
    empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(stride, dtype=torch.int64))
    values, lengths = zip(*(columns.get(feature, empty) for feature in features), strict=True)
    for feature, length_S in zip(features, lengths, strict=True):
        if len(length_S) != stride:
            raise ValueError(f"feature {feature!r} has {len(length_S)} bags; expected the stride {stride}")
    return KeyedJaggedTensor(
        keys=list(features), values=torch.cat(values), lengths=torch.cat(lengths).to(torch.int32), stride=stride
    )


def kjt_from_lists(features: Sequence[str], tokens: Sequence[Bags]) -> KeyedJaggedTensor:
    """The KeyedJaggedTensor of tokens given as dicts; a feature that a token does not name has an empty bag.

    Raises ValueError for a feature that is not in `features`, and for a negative row.

    >>> kjt_from_lists(["item_id", "genres"], [{"item_id": 5, "genres": [1, 2]}, {"item_id": 6}]).lengths().tolist()
    [1, 1, 2, 0]
    """
    if unknown := sorted({name for token in tokens for name in token} - set(features)):
        raise ValueError(f"the model has no features {unknown}; its features are {list(features)}")
    columns = {}
    for name in features:
        bags = [[rows] if isinstance(rows := token.get(name, ()), int) else list(rows) for token in tokens]
        values = torch.tensor([row for bag in bags for row in bag], dtype=torch.int64)
        if (values < 0).any():
            raise ValueError(f"feature {name!r} has the row {int(values.min())}; rows of a table count from 0")
        columns[name] = values, torch.tensor([len(bag) for bag in bags], dtype=torch.int64)
    return make_kjt(features, columns, stride=len(tokens))


class TokenEncoder(nn.Module):
    """Item and condition tokens of width D: e^t = proj^t(concat(f_1^t; f_2^t; …)), t in {item, condition}.

    Each token is one bag of every table, so that one lookup serves all tokens of a step::

        bag        0 … T-1            T … T+Q-1          T+Q … T+Q+C-1
        is         event k            query condition    candidate item
        item       item + feedback    (empty)            item features only
        condition  condition of k     condition asked    (empty)

    Feedback features are known only after an item was shown, such as the rating that it got. They are read in the
    history and empty for a candidate, so one projection serves both. Without condition features the condition token is
    a learned constant, where the prediction is read (LUM's "without condition token").
    """

    def __init__(
        self,
        tables: EmbeddingBagCollection,
        *,
        item_features: Sequence[str],
        condition_features: Sequence[str],
        dim: int,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.features = feature_order(tables)
        self.item_features = list(item_features)
        self.condition_features = list(condition_features)
        width = feature_widths(tables)
        self.item_projection = nn.Linear(sum(width[f] for f in self.item_features), dim)
        if self.condition_features:
            self.condition_projection = nn.Linear(sum(width[f] for f in self.condition_features), dim)
        else:
            self.condition_constant_D = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, tokens: KeyedJaggedTensor, *, num_events: int, num_queries: int) -> tuple[Tensor, Tensor]:
        """Item tokens [T + C, D] (events, then candidates) and condition tokens [T + Q, D] (events, then queries).

        Raises ValueError if the keys of `tokens` are not `features`, in their order.
        """
        check_keys(tokens, self.features)
        dtype = self.item_projection.weight.dtype  # a pooled lookup is float32, whatever the tables are
        embedded = {feature: bags_SE.to(dtype) for feature, bags_SE in self.tables(tokens).to_dict().items()}
        last_condition = num_events + num_queries
        item = torch.cat([embedded[f] for f in self.item_features], dim=1)
        item_XD = self.item_projection(torch.cat([item[:num_events], item[last_condition:]]))
        if not self.condition_features:
            return item_XD, self.condition_constant_D.expand(last_condition, -1)
        condition = torch.cat([embedded[f] for f in self.condition_features], dim=1)
        return item_XD, self.condition_projection(condition[:last_condition])
