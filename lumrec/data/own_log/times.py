"""The times of your log, in any of the usual forms, as microseconds UTC."""

from __future__ import annotations

import polars as pl

from lumrec.data.own_log.calendar import PER_SECOND
from lumrec.data.own_log.tables import Table
from lumrec.data.sources.raw_log import LAST_POSSIBLE_S, microseconds
from lumrec.run.errors import UserError

UNITS = ("auto", *PER_SECOND, "iso")
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", "iso": "ISO 8601"}
RECENT_S = 100_000_000  # March 1973: from here on the four units have separate ranges, so a number shows its unit
MIXED = 0.05  # share of rows in a second unit above which the unit is ambiguous


def choose_unit(table: Table, name: str, given: str) -> tuple[str, str]:
    """The unit of a time column ("s", "ms", "us", "ns", "iso", "datetime") and a text that says how it was found.

    given: the config's; "auto" reads the whole column, as a stream. Raises UserError where the column cannot hold
    times, its type does not fit `given`, or its values fit no unit or two.
    """
    if given not in UNITS:
        raise UserError(f"data.log.time_unit: got {given!r}, expected one of {', '.join(UNITS)}")
    kind = table.schema[name]
    if kind in (pl.Date, pl.Datetime):
        if given not in ("auto", "iso"):
            raise UserError(
                f"data.log.time_unit is {given!r}, and column {name!r} of {table.origin[name]} holds times already "
                f"({kind}); leave it at auto"
            )
        zone = getattr(kind, "time_zone", None)
        return "datetime", f"times ({f'zone {zone}' if zone else 'without a zone: taken as UTC'})"
    if not (kind.is_numeric() or kind in (pl.String, pl.Null)) or (kind.is_numeric() and given == "iso"):
        raise UserError(
            f"data.log.timestamp: column {name!r} of {table.origin[name]} is of type {kind}; expected "
            f"{'ISO 8601 text (data.log.time_unit is iso)' if given == 'iso' else 'times, numbers or ISO 8601 text'}"
        )
    if given != "auto":
        return given, NAMES[given]
    return _by_content(table, name)


def _by_content(table: Table, name: str) -> tuple[str, str]:
    column, kind = pl.col(name), table.schema[name]
    number = _number(column, kind)
    counts = {
        unit: number.is_between(RECENT_S * per_second, LAST_POSSIBLE_S * per_second, closed="left").sum()
        for unit, per_second in PER_SECOND.items()
    }
    if kind == pl.String:
        counts["iso"] = _iso(column).is_not_null().sum()
    example = column.filter(column.is_not_null()).first().cast(pl.String)
    facts = table.frame.select(**counts, example=example).collect(engine="streaming").row(0, named=True)
    shown = facts.pop("example")
    (unit, most), (second, fewer) = sorted(facts.items(), key=lambda pair: -pair[1])[:2]
    where = f"data.log.timestamp: column {name!r} of {table.origin[name]}"
    if not most:
        raise UserError(
            f"{where} holds no time whose unit is clear (the first value is {shown!r}); expected seconds, "
            "milliseconds, microseconds or nanoseconds since 1970, or ISO 8601 text such as 2024-05-01T12:00:00Z. For "
            "small numbers say data.log.time_unit=s (or ms, us); write 20240501 as 2024-05-01"
        )
    if fewer > MIXED * (most + fewer):
        raise UserError(
            f"{where} mixes units: {most:,} values read as {NAMES[unit]}, {fewer:,} as {NAMES[second]}. Say which is "
            f"meant, data.log.time_unit={unit}, and the others are quarantined; or write all in one unit"
        )
    return unit, f"{NAMES[unit]} (data.log.time_unit=auto{'' if unit == 'iso' else ', by the size of the numbers'})"


def looks_like_time(values: pl.Series) -> bool:
    """Whether most values of a sample are times: by their type, as ISO 8601 text, or as numbers since 1970."""
    kind = values.dtype
    if kind in (pl.Date, pl.Datetime):
        return True
    if len(values) == 0 or not (kind.is_numeric() or kind == pl.String):
        return False
    column = pl.col(values.name)
    number = _number(column, kind)
    tests = [number.is_between(RECENT_S * per, LAST_POSSIBLE_S * per) for per in PER_SECOND.values()]
    if kind == pl.String:
        tests.append(_iso(column).is_not_null())
    shares = values.to_frame().select(test.mean().alias(str(index)) for index, test in enumerate(tests)).row(0)
    return max(share or 0.0 for share in shares) > 1 - MIXED


def as_microseconds(column: pl.Expr, kind: pl.DataType, unit: str) -> pl.Expr:
    """A time column as microseconds UTC (i64), null where it is not a time within 1970-01-02 … 2100-01-01."""
    if unit == "datetime":
        return microseconds(column.cast(pl.Datetime("us")).to_physical(), "us")
    if unit == "iso":
        return microseconds(_iso(column), "us")
    if kind.is_float():
        return _of_fraction(column.cast(pl.Float64), unit)
    if kind != pl.String:
        return _of_whole(column, unit)
    text = column.str.strip_chars()
    return pl.coalesce(
        _of_whole(text.cast(pl.Int64, strict=False), unit), _of_fraction(text.cast(pl.Float64, strict=False), unit)
    )


def time_checks(column: pl.Expr, name: str, kind: pl.DataType, unit: str) -> list[tuple[pl.Expr, str]]:
    """Checks for `first_reason`: a missing time, one that cannot be read, one outside 1970-01-02 … 2100-01-01."""
    checks = [(column.is_null(), f"{name} is missing")]
    if unit == "iso":
        checks.append((_iso(column).is_null(), f"{name} is no ISO 8601 time"))
    elif unit != "datetime":
        number = _number(column, kind)
        checks.append((number.is_null(), f"{name} is not a number"))
        checks.append((~number.is_finite(), f"{name} is not finite"))
    read_as = "" if unit in ("iso", "datetime") else f", read as {NAMES[unit]}"
    impossible = as_microseconds(column, kind, unit).is_null()
    return [*checks, (impossible, f"{name} is not within 1970-01-02 and 2100-01-01{read_as}")]


def _number(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    return (column.str.strip_chars() if kind == pl.String else column).cast(pl.Float64, strict=False)


def _of_whole(number: pl.Expr, unit: str) -> pl.Expr:
    if unit == "ns":
        return microseconds(number.cast(pl.Int64, strict=False) // 1_000, "us")
    return microseconds(number.cast(pl.Int64, strict=False), unit)


def _of_fraction(number: pl.Expr, unit: str) -> pl.Expr:
    """Numbers with a fraction, such as 1714521600.25 seconds; numbers that are not finite become null."""
    return microseconds((number * (1_000_000 / PER_SECOND[unit])).round().cast(pl.Int64, strict=False), "us")


def _iso(column: pl.Expr) -> pl.Expr:
    """Microseconds UTC (i64) of text in ISO 8601: a date, with or without a time of day, fraction and zone.

    2024-05-01   2024-05-01 12:00   2024-05-01T12:00:00.250Z   2024-05-01T12:00:00+08:00; no zone is UTC.
    """
    text = column.str.strip_chars()
    # "2024-05-01T12:00" may be followed by a zone where others have seconds
    has_seconds = text.str.slice(16, 1) == ":"
    length = pl.when(text.str.len_bytes() <= 10).then(10).when(has_seconds).then(19).otherwise(16)
    clock = text.str.slice(0, length)
    padded = (
        pl.when(length == 10)
        .then(clock + " 00:00:00")
        .when(length == 16)
        .then(clock.str.replace("T", " ", literal=True) + ":00")
        .otherwise(clock.str.replace("T", " ", literal=True))
    )
    whole = padded.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False, exact=True).to_physical()
    rest = text.str.slice(length)
    fraction = rest.str.extract(r"^[.,]([0-9]{1,9})")
    micros = fraction.str.pad_end(6, "0").str.slice(0, 6).cast(pl.Int64, strict=False).fill_null(0)
    sign = pl.when(rest.str.contains("-", literal=True)).then(-1).otherwise(1)
    hours = rest.str.extract(r"[+-]([0-9]{2})(?::?[0-9]{2})?$").cast(pl.Int64, strict=False).fill_null(0)
    minutes = rest.str.extract(r"[+-][0-9]{2}:?([0-9]{2})$").cast(pl.Int64, strict=False).fill_null(0)
    is_valid = (rest == "") | rest.str.contains(r"^(?:[.,][0-9]{1,9})?(?: ?(?:[Zz]|UTC|[+-][0-9]{2}(?::?[0-9]{2})?))?$")
    return pl.when(is_valid).then(whole + micros - sign * (hours * 60 + minutes) * 60_000_000)
