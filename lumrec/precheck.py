"""What is wrong with a stage's settings, found before the stage begins: names by the schema, values by the data.

A stage checks its own before it makes its folder; a pipeline checks the names of all its stages before it starts the
first, and the values as soon as the data are prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumrec import limits
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.data.splits import PARTS, TRAIN, leave_out_later
from lumrec.errors import UserError
from lumrec.evaluation.retrieval import last_events
from lumrec.limits import check_names

if TYPE_CHECKING:
    from lumrec.config import Config

READ = "condition features that the LUM reads"


def check_schema(config: Config, schema: SchemaConfig, app: str) -> None:
    """Raises UserError for a feature or table that the settings of an app name and the (validated) schema has not."""
    from lumrec.train.lum import condition_features

    conditions, features = features_by_role(schema, "condition"), list(schema.features)
    if app in ("pretrain", "query"):
        read = condition_features(config.model, schema)
    if app == "pretrain":
        contrast = config.pretrain.contrast.feature
        check_names("pretrain.contrast.feature", [contrast] if contrast else [], read, READ)
        if contrast and schema.features[contrast].kind == "multi":
            raise UserError(
                f"pretrain.contrast.feature {contrast!r} is multi-valued: a contrast needs one value for each event"
            )
        check_names("pretrain.evaluate.condition", list(config.pretrain.evaluate.condition), read, READ)
    elif app == "query":
        from lumrec.query.stage import check_stride

        check_stride(config.query.stride, config.model)
        check_names("query.conditions", [name for each in config.query.conditions for name in each], read, READ)
    elif app == "rank":
        check_names("rank.leave_out", list(config.rank.leave_out), features, "features of the schema")
        declared = features_by_role(schema, "item")
        items = [name for name in declared if name not in config.rank.leave_out]
        if not items:
            raise UserError(f"rank.leave_out leaves no item feature for the ranker to read; keep one of {declared}")
        category = [config.rank.category] if config.rank.category else []
        check_names("rank.category", category, items, "item features that the ranker reads")
    elif app == "retrieve":
        check_names("retrieve.conditions", list(config.retrieve.conditions), conditions, "condition features")
    if app in ("pretrain", "rank", "retrieve"):
        tables = list(dict.fromkeys(feature.table for feature in schema.features.values() if feature.table))
        rates = list(getattr(config, app).train.optimizer.table_lrs)
        check_names(f"{app}.train.optimizer.table_lrs", rates, tables, "tables of the schema")


def check_data(config: Config, data: PreparedData, app: str) -> None:
    """Raises UserError for settings of a stage that cannot work, and that ask for what the prepared data have not."""
    limits.check(config)
    check_schema(config, data.schema, app)
    if app == "pretrain":
        _check_pretrain(config, data)
    elif app == "query":
        _check_query(config, data)
    elif app == "retrieve":
        from lumrec.train.retrieve import positive_events

        for part in ("valid", "test"):
            last_events(data, part, among=positive_events(config.retrieve, data), max_users=1)


def _check_pretrain(config: Config, data: PreparedData) -> None:
    from lumrec.query.conditions import condition_columns
    from lumrec.train.lum import condition_features
    from lumrec.train.pretrain import training_users

    settings, users = config.pretrain, training_users(data, config.fold)
    split = leave_out_later(data.split, data.timestamp, settings.time_share)
    if not ((split == TRAIN) & users[data.user]).any():
        raise UserError(
            f"{data.path}: there are no training events for this LUM{_of_fold(config.fold)}; choose another "
            "data.split, fold or pretrain.time_share"
        )
    if settings.select and not has_events(data, "valid", users):
        raise UserError(
            f"{data.path}: the validation part has no event{_of_fold(config.fold)}, and pretrain.select="
            f"{settings.select} chooses the weights by it; choose another data.split, or say pretrain.select= to keep "
            "the last weights"
        )
    features = condition_features(config.model, data.schema)
    condition_columns(data, features, [settings.evaluate.condition])
    if contrast := settings.contrast.feature:
        num_values = data.table_rows[data.schema.features[contrast].table] - 1
        if num_values < 2:
            raise UserError(
                f"pretrain.contrast.feature {contrast!r} has {num_values} value(s): a contrast needs two or more"
            )


def _check_query(config: Config, data: PreparedData) -> None:
    from lumrec.query.conditions import Conditions, default_conditions, expand
    from lumrec.train.lum import condition_features

    features = condition_features(config.model, data.schema)
    asked = config.query.conditions or default_conditions(data, features)
    Conditions(data, features, expand(data, features, asked, max_conditions=config.query.max_conditions))


def has_events(data: PreparedData, part: str, users: np.ndarray) -> bool:
    """Whether some of `users` (bool [U]) have an event in the part."""
    return bool(((data.split == PARTS.index(part)) & users[data.user]).any())


def _of_fold(fold: str) -> str:
    return f" of the users outside of fold {fold}" if fold else ""
