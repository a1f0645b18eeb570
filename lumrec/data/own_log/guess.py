"""Guesses which column of your log is what, by its name and its values, where the config does not say.

The report shows each guess with its reason, and the suggested config contains it; nothing else in lumrec guesses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.own_log.column_facts import SAMPLE_ROWS
from lumrec.data.own_log.config import LogConfig, as_list
from lumrec.data.own_log.read import Tables
from lumrec.data.own_log.tables import REASON, Table
from lumrec.data.own_log.times import looks_like_time
from lumrec.data.sources.raw_log import LabelConfig
from lumrec.run.errors import UserError

# Names as logs use them, the likeliest first; compared without case, blanks and punctuation.
USER_NAMES = (
    "user_id user uid user_no customer_id customer client_id visitor_id visitor member_id member account_id account "
    "buyer_id viewer_id reader_id reviewer_id user_code user_hash device_id cookie_id cookie session_id"
).split()
ITEM_NAMES = (
    "item_id item iid product_id product sku sku_id article_id article movie_id video_id content_id goods_id asin "
    "parent_asin listing_id song_id track_id book_id news_id post_id note_id ad_id adgroup_id creative_id poi_id "
    "job_id recipe_id game_id app_id document_id doc_id"
).split()
TIME_NAMES = (
    "timestamp time ts event_time event_timestamp event_ts datetime date_time time_ms time_stamp created_at created "
    "occurred_at logged_at log_time server_time click_time unix_time date day dt"
).split()
LABEL_NAMES = (
    "click clicked is_click label is_clicked click_label target y conversion converted is_conversion purchase "
    "purchased is_purchase is_buy buy bought is_like like liked long_view is_long_view rating stars overall score "
    "grade action event_type event behavior behaviour behavior_type action_type interaction btag type"
).split()
TITLE_NAMES = "title name item_name product_name item_title product_title headline".split()
# Behaviour types from shallow to deep; an event is positive where it is deeper than the shallowest in the log.
DEPTHS = (
    "impression impressions show shown exposure expose skip dislike hide".split(),
    "view views pv page_view pageview detail detail_view click clicks play".split(),
    "fav favorite favourite like collect wish wishlist add_to_wishlist share comment follow".split(),
    "cart add_to_cart addtocart basket add_to_basket".split(),
    "buy purchase order transaction pay paid checkout conversion convert download subscribe install".split(),
)
# Parts of names of what is known only after the item was shown.
AFTER = re.compile(
    r"dwell|watch|play_?(time|duration|ms)|view_?(time|duration)|duration|stay|scroll|finish|complet|progress|enter|rating|"
    r"(ms|s|secs?|seconds|minutes|time)_(played|viewed|listened)|listen_?(time|duration|ms)|"
    r"stars|review|comment|feedback|outcome|reward|revenue|gmv|paid|quantity|qty|amount|"
    r"^(is_)?(click|like|follow|forward|hate|share|buy|bought|purchase|cart|convert|conversion|order|favou?rite|long_view|"
    r"effective_view|valid_play|skip|skipp)(ed|s|d)?$"
)
CONDITION = re.compile(
    r"scen[ae]|page|tab$|channel|surface|placement|slot|module|section|query|search|keyword|intent|categor|genre|topic|"
    r"source$|entry"
)
CODE = re.compile(
    r"(^|_)(id|ids|code|zip|zip_code|type|cat|category|brand|bucket|level|flag|class|cluster|hour|weekday)$"
)
TRUTH = {"true": "1", "yes": "1", "false": "0", "no": "0"}
NUMBERS = 0.95  # share of numbers from which a label is numeric; rows with other values will be quarantined
SEPARATORS = ("|", ";", ",")


@dataclass(frozen=True)
class Guess:
    """A choice: what for, the column (or another value), and why."""

    what: str
    value: str
    why: str


def squeezed(name: str) -> str:
    """A name without case, blanks and punctuation: userId, USER_ID and "user id" are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def sample(table: Table) -> pl.DataFrame:
    """The first usable rows of a table, with its own columns."""
    good = table.frame.filter(pl.col(REASON).is_null()).select(list(table.schema))
    return good.head(SAMPLE_ROWS).collect(engine="streaming")


def guess_data(data: DataConfig, tables: Tables) -> tuple[DataConfig, list[Guess]]:
    """The config with every gap filled in, and each choice with its reason.

    Columns that the config names are kept. Raises UserError where no column looks like the user, the item or the time;
    the message lists the candidates.
    """
    samples = {table.name: sample(table) for table in tables}
    log, guesses = _keys(data.log, tables, samples["events"])
    for key, name, table in (("item", "items", tables.items), ("user", "users", tables.users)):
        if table is None:
            continue
        given = getattr(log, f"{key}_in_{name}")
        column = given or _find(table, getattr(log, key), ITEM_NAMES if key == "item" else USER_NAMES)
        if not given and column and column != getattr(log, key):
            log = replace(log, **{f"{key}_in_{name}": column})  # type: ignore[arg-type]
        guesses.append(Guess(f"{key} in {name}", column or getattr(log, key), "data.log" if given else "by its name"))
    if tables.items is not None and not log.title and "title" not in tables.items.schema:
        title = _by_name(tables.items.schema.names(), TITLE_NAMES)
        if title and tables.items.schema[title] == pl.String:
            log = replace(log, title=title)
            guesses.append(Guess("title", title, "by its name"))
    label, all_positive, guess = _label(data, tables.events, samples["events"], log)
    guesses.append(guess)
    log = replace(log, all_positive=all_positive)
    if not as_list(log.decimal_comma):
        found = [
            name
            for table in tables
            if table.is_text and table.separator != ","
            for name in table.schema
            if _has_decimal_comma(samples[table.name][name])
        ]
        if found:
            log = replace(log, decimal_comma=found)
            guesses.append(Guess("decimal_comma", ", ".join(found), "numbers such as 1,5"))
    if not as_list(log.lists):
        log, guessed = _lists(log, tables, samples)
        guesses += guessed
    return replace(data, log=log, label=label), guesses


def _keys(log: LogConfig, tables: Tables, rows: pl.DataFrame) -> tuple[LogConfig, list[Guess]]:
    """User, item and time of the events."""
    default, events = LogConfig(), tables.events
    guesses: list[Guess] = []
    taken: list[str] = []
    undecided: list[str] = []
    for key, names in (("user", USER_NAMES), ("item", ITEM_NAMES), ("timestamp", TIME_NAMES)):
        given = getattr(log, key)
        if key == "timestamp" and not given:
            guesses.append(Guess(key, "none", "data.log.timestamp is '': the rows are in the order of events"))
            continue
        if given in events.schema or given != getattr(default, key):
            events.require(given, f"data.log.{key}")
            column, why = given, f"data.log.{key}" if given != getattr(default, key) else "by its name"
        else:
            column, why = _find(events, given, names, avoid=taken) or "", "by its name"
            if not column and key == "timestamp":
                times = [name for name in rows.columns if looks_like_time(rows[name])]
                column, why = times[0] if len(times) == 1 else "", "the only one that holds times"
            if not column:
                undecided.append(key)
                continue
            log = replace(log, **{key: column})  # type: ignore[arg-type]
        taken.append(column)
        guesses.append(Guess({"timestamp": "time"}.get(key, key), column, why))
    if undecided:
        raise UserError(_undecided(undecided, events, rows, taken))
    return log, guesses


def _undecided(keys: Sequence[str], events: Table, rows: pl.DataFrame, taken: Sequence[str]) -> str:
    names = [{"user": "a user", "item": "an item", "timestamp": "a time"}[key] for key in keys]
    free = [name for name in rows.columns if name not in taken]
    examples = [f"{name} (such as {value!r})" for name in free for value in rows[name].drop_nulls().head(1).to_list()]
    return (
        f"no column of {events.files[0].file} has the name of {' or of '.join(names)}. Name "
        f"{'it' if len(keys) == 1 else 'them'}, {' '.join(f'data.log.{key}=<column>' for key in keys)}, out of: "
        + ", ".join(examples)
        + ("; or data.log.timestamp='' if there are no times and the rows are in order" * ("timestamp" in keys))
    )


def _find(table: Table, wanted: str, names: Sequence[str], avoid: Sequence[str] = ()) -> str | None:
    """The column `wanted`, else the one whose name is the likeliest of `names`."""
    if wanted in table.schema and wanted not in avoid:
        return wanted
    return _by_name([name for name in table.schema if name not in avoid], [wanted, *names])


def _by_name(columns: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {squeezed(column): column for column in reversed(columns)}
    return next((plain[squeezed(name)] for name in names if squeezed(name) in plain), None)


def _label(data: DataConfig, events: Table, rows: pl.DataFrame, log: LogConfig) -> tuple[LabelConfig, bool, Guess]:
    """The label, whether all events are positive, and how that was chosen."""
    label = data.label
    has_rule = bool(label.values) or label.at_least is not None
    if log.all_positive:
        return label, True, Guess("label", "every event is positive", "data.log.all_positive")
    column = label.column or ("label" if "label" in events.schema else "")
    if column:
        events.require(column, "data.label.column")
        if has_rule:
            return label, False, Guess("label", column, "data.label")
        rule, why = positive_of(rows[column], column) or (replace(label, column=column), "read as 0/1")
        return rule, False, Guess("label", column, f"data.label.column; {why}")
    free = [name for name in events.schema if name not in (log.user, log.item, log.timestamp)]
    plain = {squeezed(name): name for name in reversed(free)}
    for column in (plain[squeezed(name)] for name in LABEL_NAMES if squeezed(name) in plain):
        as_given = (replace(label, column=column), "positive as data.label says")
        if found := as_given if has_rule else positive_of(rows[column], column):
            return found[0], False, Guess("label", column, f"by its name; {found[1]}")
    return LabelConfig(), True, Guess("label", "every event is positive", "no column looks like a label")


def positive_of(values: pl.Series, column: str) -> tuple[LabelConfig, str] | None:
    """A rule for what is positive in a column, and a text that says it; None where the column is no label."""
    if isinstance(values.dtype, (pl.List, pl.Array, pl.Struct)):
        return None
    texts = values.drop_nulls().cast(pl.String).str.strip_chars()
    kinds = texts.unique().to_list()
    if not kinds:
        return None
    numbers = texts.str.to_lowercase().replace(TRUTH).cast(pl.Float64, strict=False).drop_nulls()
    if len(numbers) >= NUMBERS * len(texts) and set(numbers.unique().to_list()) <= {0.0, 1.0}:
        return LabelConfig(column), "0/1"
    if len(numbers) >= NUMBERS * len(texts) and 2 < numbers.n_unique() <= 101:
        top = float(numbers.max())  # type: ignore[arg-type]
        if 0 < top <= 100 and float(numbers.min()) >= 0:  # type: ignore[arg-type]
            least = round(0.8 * top, 2)
            return LabelConfig(column, at_least=least), f"positive from {least:g} of {top:g} on"
        return None
    depths = {
        text: depth for text in kinds for depth, names in enumerate(DEPTHS) if squeezed(text) in map(squeezed, names)
    }
    if depths and len(kinds) <= 50:
        shallow = min(depths.values())
        if deeper := sorted(text for text, depth in depths.items() if depth > shallow):
            others = sorted(set(kinds) - set(deeper))
            return LabelConfig(column, values=deeper), f"positive: {', '.join(deeper)}; not: {', '.join(others)}"
    return None


def _lists(log: LogConfig, tables: Tables, samples: dict[str, pl.DataFrame]) -> tuple[LogConfig, list[Guess]]:
    """Text columns that hold several values with a separator between them, the same one for all."""
    for separator in dict.fromkeys([log.list_separator, *SEPARATORS]):
        found: list[str] = []
        for table in tables:
            if not table.is_text or (separator == log.separator and not log.quote):
                continue
            keys = [log.user, log.item, log.timestamp, log.title, "title", "name", "description"]
            keys += as_list(log.decimal_comma)
            found += [n for n in table.schema if n not in keys and _holds_lists(samples[table.name][n], separator)]
        if found:
            found = list(dict.fromkeys(found))
            guess = Guess("lists", ", ".join(found), f"several values with {separator!r} between them")
            return replace(log, lists=found, list_separator=separator), [guess]
    return log, []


def _has_decimal_comma(values: pl.Series) -> bool:
    """Whether all texts are numbers, some with a comma that is not always followed by three digits."""
    texts = values.drop_nulls().str.strip_chars()
    fractions = texts.filter(texts.str.contains(",", literal=True))
    whole = bool(texts.str.contains(r"^[+-]?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+)(,[0-9]+)?$").all())
    return whole and len(fractions) > 0 and not bool(fractions.str.contains(r",[0-9]{3}$").all())


def _holds_lists(values: pl.Series, separator: str) -> bool:
    """Whether many texts have the separator, and the values between them repeat as those of a vocabulary do."""
    texts = values.drop_nulls()
    # "(250,500]" is one value: a range
    texts = texts.filter(~texts.str.contains(r"^[\[(].*[\])]$"))
    if len(texts) < 0.5 * len(values.drop_nulls()) or len(texts) == 0:
        return False
    if float(texts.str.contains(separator, literal=True).mean()) < 0.1:  # type: ignore[arg-type]
        return False
    each = texts.str.split(separator).explode(empty_as_null=True).drop_nulls()
    blanks = float(each.str.strip_chars().str.contains(" .* ").mean())  # type: ignore[arg-type]
    return each.n_unique() <= max(20, 0.5 * len(each)) and blanks < 0.2


def is_known_after(name: str) -> bool:
    """Whether a column has the name of something that is known only after the item was shown."""
    return AFTER.search(_snake(name)) is not None


def is_condition(name: str) -> bool:
    """Whether a column has the name of a condition, such as the scene in which an item is shown."""
    return CONDITION.search(_snake(name)) is not None


def is_time(name: str) -> bool:
    """Whether a column has the name of a time."""
    return squeezed(name) in map(squeezed, TIME_NAMES)


def is_code(name: str) -> bool:
    """Whether a column of numbers has the name of an id or code rather than of a quantity."""
    return CODE.search(_snake(name)) is not None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace(" ", "_").replace("-", "_")
