"""Forms of one value that a log must not mix: 54 and 54.0, 007 and 7, "7" and " 7", True and true, and what looks
alike: with and without a zero-width character, an accent in one or two code points, full-width and plain digits.

A value is the text that its file holds, so two forms are two values: an item would be double, or a category unknown. Of
columns that are numbers in their file the text is: 54 of a whole number, and of 54.0 too, as missing values turn whole
numbers into floats; 0.5 of a fraction; true or false.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.run.errors import UserError

_WHOLE_OR_FRACTION = r"^[+-]?[0-9]+(\.[0-9]*)?$"
_EXPONENT = r"^[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]{1,2}$"


def one_form(text: pl.Expr) -> pl.Expr:
    """The form that all forms of one value have in common.

    >>> pl.Series(["007", "7.0", " 7", "+7", "7e0", "7.50", "7.5 ", "TRUE", "-0"]).to_frame("x").select(
    ...     one_form(pl.col("x"))).to_series().to_list()
    ['7', '7', '7', '7', '7', '7.5', '7.5', 'true', '0']
    >>> pl.Series(["７", "7\u200b", "7\ufe0f", "7,0", "\ufeffa\xa0b\xa0", "e\u0301"]).to_frame("x").select(
    ...     one_form(pl.col("x"))).to_series().to_list()
    ['7', '7', '7', '7', 'a b', 'é']
    """
    # NFKC makes blanks of non-breaking ones; Cf and DI are the characters that no one sees, such as U+200B and U+FE0F.
    text = text.str.normalize("NFKC").str.replace_all(r"[\p{Cf}\p{DI}]", "").str.strip_chars()
    text = text.str.replace(r"^([+-]?[0-9]+),0$", "${1}")  # a float that was written with a decimal comma
    lower = text.str.to_lowercase()
    number = text.str.replace(r"^\+", "").str.replace(r"^(-?)0+([0-9])", "${1}${2}")
    number = pl.when(number.str.contains(".", literal=True)).then(number.str.replace(r"\.?0*$", "")).otherwise(number)
    number = pl.when(number == "-0").then(pl.lit("0")).otherwise(number)
    whole = text.cast(pl.Float64, strict=False)
    fits = (whole == whole.floor()) & (whole.abs() < 2.0**53)
    return (
        pl.when(text.str.contains(_WHOLE_OR_FRACTION))
        .then(number)
        .when(text.str.contains(_EXPONENT) & fits)
        .then(whole.cast(pl.Int64, strict=False).cast(pl.String))
        .when(lower.is_in(["true", "false"]))
        .then(lower)
        .otherwise(text)
    )


def as_text(values: pl.Series) -> pl.Series:
    """The text of each value of a column that is looked up in a vocabulary; null where it is missing."""
    return values.to_frame().select(text_of(pl.col(values.name), values.dtype)).to_series()


def text_of(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """As `as_text`, of values of this type."""
    if not kind.is_float():
        return value.cast(pl.String)
    is_whole = (value == value.floor()) & (value.abs() < 2.0**53)
    text = pl.when(is_whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(value.cast(pl.String))
    return pl.when(value.is_not_nan()).then(text)


def shown(form: str) -> str:
    """A form in quotes, so that one sees how it differs from another: beyond ASCII by its code points too."""
    return repr(form) if form.isascii() else f"{form!r} ({form!a})"


def mixed_forms(values: pl.Series, others: pl.Series | None = None) -> tuple[str, str] | None:
    """Two forms of one value among `values`, or one of `values` and one of `others`; None where none is mixed.

    Both hold distinct texts. Of several such values the first one by its common form.
    """
    frame = values.cast(pl.String).alias("form").to_frame().with_columns(here=True)
    if others is not None:
        there = others.cast(pl.String).alias("form").to_frame().with_columns(here=False)
        frame = pl.concat([frame.join(there, on="form", how="anti"), there.join(frame, on="form", how="anti")])
    frame = frame.drop_nulls().unique(maintain_order=True).with_columns(one_form(pl.col("form")).alias("value"))
    sides = 1 if others is None else 2
    mixed = frame.group_by("value").agg("form", pl.col("here").n_unique().alias("sides"), pl.col("here"))
    mixed = mixed.filter((pl.col("form").list.len() > 1) & (pl.col("sides") >= sides)).sort("value")
    if not len(mixed):
        return None
    forms = list(zip(mixed["form"][0], mixed["here"][0]))
    if others is None:
        return forms[0][0], forms[1][0]
    return next(form for form, here in forms if here), next(form for form, here in forms if not here)


def check_forms(
    schema: SchemaConfig,
    blocks: Sequence[Path],
    catalogues: dict[str, pl.DataFrame],
    older: dict[str, pl.DataFrame],
    exact: Sequence[str],
) -> None:
    """Raises UserError, which names both, where a table would have two forms of one value, or `older` has another form.

    blocks: Parquet files of events, features by name. catalogues: items and users by role. older: vocabularies of an
    earlier log by table. exact: columns that may mix forms.
    """
    for table in schema.tables:
        features = {name: feature for name, feature in schema.features.items() if feature.table == table}
        if any(feature.column in exact for feature in features.values()):
            continue
        values = pl.concat([_distinct(name, of, blocks, catalogues) for name, of in features.items()]).unique()
        columns = " and ".join(sorted({repr(feature.column) for feature in features.values()}))
        last_words = f"; or, where they are two values, say data.log.exact=[{next(iter(features.values())).column}]"
        if found := mixed_forms(values):
            raise UserError(
                f"column {columns}: {shown(found[0])} and {shown(found[1])} are two forms of one value, and would be "
                f"two rows of table {table!r}: write it in one form{last_words}"
            )
        if table in older and (found := mixed_forms(values, older[table]["key"])):
            raise UserError(
                f"column {columns}: this log has {shown(found[0])}, and the one whose vocabulary it takes over "
                f"(data.vocabulary_from) {shown(found[1])}: write it in that form{last_words}"
            )


def _distinct(
    name: str, feature: FeatureConfig, blocks: Sequence[Path], catalogues: dict[str, pl.DataFrame]
) -> pl.Series:
    """The distinct texts of a feature."""
    if feature.role in catalogues:
        values = catalogues[feature.role][feature.column]
    else:
        values = pl.scan_parquet(list(blocks)).select(name).unique().collect(engine="streaming").to_series()
    if isinstance(values.dtype, pl.List):
        values = values.unique().explode(empty_as_null=True)
    if values.dtype.is_float() and bool((values.drop_nans().abs() >= 2.0**53).any()):
        raise UserError(
            f"schema.features.{name}: column {feature.column!r} holds floats beyond 2^53, which cannot tell whole "
            "numbers apart; write them as whole numbers or as text"
        )
    return as_text(values).unique().drop_nulls().alias("")
