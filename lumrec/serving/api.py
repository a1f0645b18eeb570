"""Fields of requests and answers, as the OpenAPI page shows them. Unknown fields and wrong types are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lumrec.run.errors import did_you_mean
from lumrec.run.printable import printable

MOST_SECONDS = 2**43  # largest time: in microseconds it still fits 64 bits
MOST_ITEMS = 1_000_000  # in an answer
MOST_CONDITIONS = 64  # in a request

User = Annotated[str, Field(description="raw key of the user, as in the log", examples=["42"])]
Items = Annotated[list[str], Field(min_length=1, description="raw keys of the candidates", examples=[["1", "2", "3"]])]
Number = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Value = str | bool | Number | float | None
Features = dict[str, Value | list[Value]]
Context = Annotated[Features, Field(description="raw value, or list of values, of each context feature")]
PerItem = Annotated[
    dict[str, list[Value | list[Value]]],
    Field(description="context that differs between candidates: one value for each item"),
]
Time = Annotated[
    float | None,
    Field(ge=-MOST_SECONDS, le=MOST_SECONDS, description="seconds since 1970 (UTC), with fractions; null = now"),
]
Timeout = Annotated[float | None, Field(ge=1, description="ask for an answer in less time than serve.timeout_ms")]
RequestId = Annotated[str, Field(max_length=128, description='name of this request in the log; "" = a random one')]


def _whole(number: object) -> object:
    """10 for 10.0, because JSON does not distinguish them."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class Strict(BaseModel):
    """A body without unknown fields, each of the declared type: 42 is not accepted as text, nor NaN as a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


K = Annotated[
    int,
    Field(ge=1, le=MOST_ITEMS, description="items to answer with, the best first"),
    BeforeValidator(_whole),  # behind the limits, which the OpenAPI page would not show otherwise
]


class ScoreBody(Strict):
    """One user, and the items to score."""

    user: User
    items: Items
    context: Context = {}
    per_item: PerItem = {}
    time: Time = None
    timeout_ms: Timeout = None
    request_id: RequestId = ""


class RankBody(ScoreBody):
    """One user, and the items to rank."""

    k: K = 10


Condition = dict[str, str]


class RetrieveBody(Strict):
    """A user whose best items are looked up in the store of the LUM's answers."""

    user: User
    condition: Annotated[
        Condition | None,
        Field(description="one of the conditions in the store; null = its first", examples=[None]),
    ] = None
    k: K = 10
    timeout_ms: Timeout = None


class AskBody(Strict):
    """A user, and the conditions under which the LUM is asked about the user now."""

    user: User
    conditions: Annotated[
        list[Condition],
        Field(min_length=1, max_length=MOST_CONDITIONS, examples=[[{"feedback": "like"}]]),
    ]
    k: K = 10
    timeout_ms: Timeout = None


class FoundItem(BaseModel):
    """An item and how well it fits. share: its probability among all items under the condition."""

    item: str
    similarity: float
    share: float | None


class Retrieved(BaseModel):
    """The items that fit best, best first; no items for a user without an answer in the store."""

    condition: Condition
    knowledge: bool
    items: list[FoundItem]


class Asked(BaseModel):
    """The items that fit best under each condition; no answers for a user without events."""

    unknown_user: bool
    answers: list[Retrieved]


class EventBody(Strict):
    """What a user did with an item that was shown."""

    user: User
    item: Annotated[str, Field(description="raw key of the item")]
    label: Annotated[float, Field(ge=0, le=1, description="1 = the user liked it, as the log has it")]
    time: Time = None
    features: Annotated[Features, Field(description="raw values of the features of events, by name")] = {}
    event_id: Annotated[str, Field(max_length=1024, description="an event with an id counts once")] = ""
    request_id: Annotated[str, Field(max_length=128, description="of the answer that showed the item")] = ""


class EventsBody(Strict):
    """Events of any users, in the order in which they happened."""

    events: Annotated[
        list[EventBody],
        Field(min_length=1, examples=[[{"user": "42", "item": "1", "label": 1, "event_id": "e-17"}]]),
    ]
    timeout_ms: Timeout = None


class EventsTaken(BaseModel):
    """Numbers of events by outcome. known: sent before. late: left out, because they are older than what is kept to
    recognise repeated events. forgotten: left out, because their users were forgotten.
    """

    new: int
    known: int
    late: int
    forgotten: int


class KnowledgeUsed(BaseModel):
    """Whether the LUM's answers for this user were there, and how old they are."""

    present: bool
    age_s: float | None = Field(description="seconds since the LUM was asked")


class Answer(BaseModel):
    """Fields of every answer. unknown_items: candidates that the ranker was not trained on. unknown_values: number of
    context values that were not given or that the ranker was not trained on. cut: the request is for a time so early
    that the state no longer holds everything that the user had done by then.
    """

    request_id: str
    bundle: str = Field(description="version of the bundle that scored")
    unknown_user: bool
    unknown_items: list[str]
    unknown_values: int
    cut: bool
    knowledge: KnowledgeUsed


class Scores(Answer):
    """The probability of each item, in the order of the request."""

    scores: list[float]


class RankedItem(BaseModel):
    """An item and its probability."""

    item: str
    score: float


class Ranking(Answer):
    """The best items, the best first. Items with the same score keep their order."""

    items: list[RankedItem]


class Problem(BaseModel):
    """Why there is no answer, in one sentence."""

    detail: str


class Ready(BaseModel):
    """Whether this process takes requests, and what it serves. problems: what cannot be read at the moment."""

    ready: bool
    bundle: str
    problems: list[str]


class Alive(BaseModel):
    """This process runs."""

    alive: bool = True


def example(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the required fields of a schema, filled with the schema's examples."""
    fields = schema.get("properties", {})
    return {name: fields[name].get("examples", [None])[0] for name in schema.get("required", []) if name in fields}


def sentence(errors: Sequence[Mapping[str, Any]], fields: Sequence[str] = ()) -> str:
    """One sentence for pydantic's first error in a body. fields: known names, for a hint."""
    first = errors[0]
    said, path = first["msg"][:1].lower() + printable(first["msg"][1:])[:200], first["loc"][1:]
    for place, part in enumerate(path[:-2]):
        if part in ("context", "features", "per_item"):  # a value may be any of several types: the errors are of each
            said, path = "input should be text, a number, true, false, null or a list of these", path[: place + 2]
            break
    where = ""
    for part in path:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    where = printable(where)[:120] or "the body"
    if first["type"] == "extra_forbidden":
        return f"{where} is no field of this request{did_you_mean(where, fields)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    got = "" if isinstance(first["input"], dict) else f", got {printable(repr(first['input'])[:60])}"
    return f"{where}: {said}{got}"
