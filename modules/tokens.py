"""Token encoder: sharded embedding tables, concatenation, one linear projection per token type (LUM section 4.1.2).

Shape suffixes: S bags (stride), T events, Q query conditions, C candidate items, D model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Bags = Mapping[str, int | Sequence[int]]  # of one token: feature -> row of its table, or several rows


def make_tables(
    tables: Mapping[str, tuple[int, int]],
    features: Mapping[str, str],
    *,
    device: torch.device | str | None = None,
) -> EmbeddingBagCollection:
    """The embedding tables as one EmbeddingBagCollection with mean pooling.

    tables: name -> (rows, width); row 0 is "unknown". features: feature -> name of its table; features may share one.
    Tables that no feature reads are left out. Rows start uniform in ±1/sqrt(width), whatever the number of rows, so
    that tables of all sizes start with vectors of the same length; row 0 starts at zero, as neutral as an empty bag:
    where the vocabulary covers the training part, no gradient ever reaches it.

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


def feature_order(tables: EmbeddingBagCollection) -> list[str]:
    """The one order of KJT keys that these tables are ever called with.

    A sharded EmbeddingBagCollection caches the order at its first call and silently misreads any other.
    """
    return [feature for config in tables.embedding_bag_configs() for feature in config.feature_names]


def guard_key_order(model: nn.Module) -> None:
    """Makes each sharded embedding module in `model` raise ValueError for keys in another order than in its first call.

    Without it such a module reads wrong rows, silently: it keeps the order of the first KeyedJaggedTensor that it sees.
    Call it once, after DistributedModelParallel; above all where two models share tables. Modules that are not sharded
    go by the names and are left alone.
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
    """A KeyedJaggedTensor whose keys are `features` in exactly this order, with `stride` bags each.

    columns: feature -> (values int64, lengths int64 [stride]); a feature that is not given has empty bags.
    Raises ValueError for a column that is not in `features` or has another number of bags.

    >>> kjt = make_kjt(["item_id", "genres"], {"genres": (torch.tensor([3, 4, 5]), torch.tensor([2, 1]))}, stride=2)
    >>> kjt.lengths().tolist()
    [0, 0, 2, 1]
    """
    unknown = sorted(set(columns) - set(features))
    if unknown:
        raise ValueError(f"columns {unknown} are no features of these tables; the features are {list(features)}")
    empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(stride, dtype=torch.int64))
    values, lengths = zip(*(columns.get(feature, empty) for feature in features), strict=True)
    for feature, length_S in zip(features, lengths, strict=True):
        if len(length_S) != stride:
            raise ValueError(f"feature {feature!r} has {len(length_S)} bags; expected the stride {stride}")
    return KeyedJaggedTensor(
        keys=list(features), values=torch.cat(values), lengths=torch.cat(lengths).to(torch.int32), stride=stride
    )


def kjt_from_lists(features: Sequence[str], tokens: Sequence[Bags]) -> KeyedJaggedTensor:
    """The KeyedJaggedTensor of plain tokens: one bag of every feature for each; what a token leaves out is empty.

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
    """Condition and item tokens in one model width: e^t = proj^t(concat(f_1^t; f_2^t; …)), t in {item, condition}.

    Each token is one bag of every table, so that one lookup serves all tokens of a step, whatever their type::

        bag        0 … T-1            T … T+Q-1          T+Q … T+Q+C-1
        is         event k            query condition    candidate item
        item       item + feedback    (empty)            item features only
        condition  condition of k     condition asked    (empty)

    Feedback features (what is known only after an item was shown, such as the rating given) are read in the history and
    empty in a candidate, so one projection serves both. Without any condition feature the condition token is a learned
    constant: LUM's "without condition token", kept as a place to read the prediction from.
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
        width = {f: config.embedding_dim for config in tables.embedding_bag_configs() for f in config.feature_names}
        self.item_projection = nn.Linear(sum(width[f] for f in self.item_features), dim)
        if self.condition_features:
            self.condition_projection = nn.Linear(sum(width[f] for f in self.condition_features), dim)
        else:
            self.condition_constant_D = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, tokens: KeyedJaggedTensor, *, num_events: int, num_queries: int) -> tuple[Tensor, Tensor]:
        """Item tokens [T + C, D] (events, then candidates) and condition tokens [T + Q, D] (events, then queries)."""
        if tokens.keys() != self.features:
            raise ValueError(f"tokens have the keys {tokens.keys()}; the tables are called with {self.features} only")
        dtype = self.item_projection.weight.dtype  # a pooled lookup is float32, whatever the tables are
        embedded = {feature: bags_SE.to(dtype) for feature, bags_SE in self.tables(tokens).to_dict().items()}
        last_condition = num_events + num_queries
        item = torch.cat([embedded[f] for f in self.item_features], dim=1)
        item_XD = self.item_projection(torch.cat([item[:num_events], item[last_condition:]]))
        if not self.condition_features:
            return item_XD, self.condition_constant_D.expand(last_condition, -1)
        condition = torch.cat([embedded[f] for f in self.condition_features], dim=1)
        return item_XD, self.condition_projection(condition[:last_condition])
