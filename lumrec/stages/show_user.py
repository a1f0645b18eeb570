"""Shows what the LUM knows about one user: the last events and, for each condition, the best-matching items.

    user 42: 51 events, the last 3
      2000-12-29  Toy Story (1995)                  feedback like, rating 5
      ...
    feedback=like
       1. Toy Story 2 (1999)                        4.71 2.31% seen
       ...

It asks the LUM, not the knowledge store, so `query.conditions` can name any conditions.

Shape suffixes: N conditions, D width, I catalogue items, k items shown.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import user_fold
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.models.lum import condition_features, load_lum
from lumrec.models.lum_folds import find_lums, open_lums
from lumrec.query.conditions import default_conditions, spoken
from lumrec.query.group_query import GroupQuery, serving_windows, user_rows
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.run.limits import count
from lumrec.run.page import write_page
from lumrec.run.printable import printable, say
from lumrec.stages.query import QueryConfig

logger = logging.getLogger(__name__)
TITLE_WIDTH = 48


@dataclass(frozen=True)
class ShowUserConfig:
    """Which user to show, and how much. The conditions come from `query.conditions`.

    user: raw key of the user.
    top: items shown for each condition.
    events: number of the user's last events that are shown.
    leave_out_seen: show only items that the user has no event with; otherwise these are marked.
    page: HTML file to write the same to; "" = none.
    """

    user: str = ""
    top: int = count(10, least=1)
    events: int = count(10)
    leave_out_seen: bool = False
    page: str = ""

    def check(self, at: str) -> None:
        """Raises UserError for a page whose name does not end with .html (`at`: the section, with a dot)."""
        if self.page and not self.page.endswith(".html"):
            raise UserError(f"{at}page: got {self.page!r}, expected the name of a file that ends with .html")


class Event(NamedTuple):
    """date: "" where the log's times are no dates. features: feature → raw value of the event."""

    date: str
    title: str
    features: dict[str, str]


class Match(NamedTuple):
    """similarity: o · e. share: exp(o · e − log_z), the item's probability among the catalogue under this condition."""

    title: str
    similarity: float
    share: float
    seen: bool


class UserView(NamedTuple):
    """What `look` returns. conditions: as asked about this user. matches: the best items of each, best first."""

    user: str
    num_events: int
    events: list[Event]
    conditions: list[dict[str, str]]
    matches: list[list[Match]]


def run(common: Common, settings: ShowUserConfig, asked: QueryConfig) -> dict[str, float | str]:
    """Prints what the LUM knows about the user `show_user.user`; returns the numbers of events and conditions.

    Of cross-fitted LUMs (inputs.lums), it asks the one that was not trained on the user. If apps/pretrain.py made no
    LUM with this config's name, it asks those of the config's pipeline. Raises MissingFileError for a missing input,
    UserError for an unknown user (it names the nearest), condition or setting.
    """
    device = init_distributed(threads=common.threads)
    common = of_pipeline(common)
    open_lums(common)  # raises, if one is missing, before data are read
    data = open_or_prepare(common, make=False)
    lums = find_lums(common, data)
    if not settings.user:
        some = data.user_keys()[0]
        raise UserError(
            f"no user is given; expected show_user.user=<raw key>, such as {shlex.quote(f'show_user.user={some}')}"
        )
    user = int(user_rows(data, [settings.user])[0])
    lum = lums[int(user_fold([settings.user], len(lums))[0])]
    model = lum.trained.model
    features = condition_features(model, data.schema)
    conditions = asked.conditions or default_conditions(data, features)
    dmp, builder, _ = load_lum(lum.trained.folder, data, device=device)
    query = GroupQuery(dmp, builder, conditions, max_events=model.max_events, max_conditions=asked.max_conditions)
    view = look(query, user, num_top=settings.top, num_events=settings.events, leave_out_seen=settings.leave_out_seen)
    say(f"{lum.run} says of\n{text(view)}")
    if settings.page:
        say(f"\npage {show_on_page(Path(settings.page), lum.run, view)}")
    return {"user": view.user, "events": view.num_events, "conditions": len(view.conditions)}


def of_pipeline(common: Common) -> Common:
    """`common` with the data and LUMs of its pipeline as inputs, if it names none and no LUM has its name."""
    inputs, name = common.inputs, common.name
    if inputs.prepared or inputs.lums or (common.runs / f"{name}-pretrain").exists():
        return common
    # The last two are the possible names of a pipeline with pipeline.dataset=auto.
    for run in [common.run] if common.run else [name, f"{name}-ml-1m", f"{name}-simulator"]:
        folder = common.runs / run
        lums = [f"{run}/{path.parent.name}" for path in sorted(folder.glob("lum*/result.json"))]
        if lums and (folder / "prepare").exists():
            logger.info("asking the LUMs of the pipeline in %s", folder)
            return dataclasses.replace(common, inputs=dataclasses.replace(inputs, prepared=f"{run}/prepare", lums=lums))
    return common


def look(
    query: GroupQuery, user: int, *, num_top: int = 10, num_events: int = 10, leave_out_seen: bool = False
) -> UserView:
    """The user's last events, and the items that the LUM ranks first under each of the query's conditions."""
    data = query.data
    start, end = data.user_offsets[user : user + 2].tolist()
    titles = data.item_titles()
    o_ND, e_ID = query.users(torch.tensor([user]))[0], query.items()
    similarity_NI = o_ND @ e_ID.T
    share_NI = (similarity_NI - log_normalizer(o_ND, e_ID)[:, None]).exp()
    seen_I = torch.from_numpy(np.bincount(data.item[start:end], minlength=data.num_items) > 0)
    shown_NI = similarity_NI.masked_fill(seen_I, float("-inf")) if leave_out_seen else similarity_NI
    num_top = min(num_top, data.num_items - (int(seen_I.sum()) if leave_out_seen else 0))
    matches = [
        [Match(titles[i], float(similarity_NI[n, i]), float(share_NI[n, i]), bool(seen_I[i])) for i in best_k.tolist()]
        for n, best_k in enumerate(shown_NI.topk(num_top).indices)
    ]
    events = last_events(query, range(max(start, end - num_events), end), titles)
    asked = serving_windows(data, torch.tensor([user]), max_events=query.max_events)
    conditions = query.asked.spelled(asked.windows, asked.window_R, asked.seen_R, history_W=torch.tensor([0]))
    return UserView(data.user_keys()[user], end - start, events, conditions, matches)


def last_events(query: GroupQuery, rows: range, titles: Sequence[str]) -> list[Event]:
    """The events of these rows, with the condition and feedback features that the LUM reads."""
    data, names = query.data, [*query.builder.condition_features, *query.builder.feedback_features]
    raw = {name: {row: value for value, row in data.vocabulary(_table(data, name)).items()} for name in names}
    events = []
    for row in rows:
        values = {
            name: "|".join(raw[name].get(value, "(unknown)") for value in bag.tolist())
            for name in names
            for bag in data.event_columns[name].take(torch.tensor([row]))[:1]
        }
        when = datetime.fromtimestamp(int(data.timestamp[row]), tz=timezone.utc).date().isoformat()
        events.append(Event(when if data.absolute_time else "", titles[data.item[row]], values))
    return events


def text(view: UserView) -> str:
    """A view as lines of text."""
    lines = [f"user {printable(view.user)}: {view.num_events:,} events, the last {len(view.events)}"]
    for date, title, features in view.events:
        said = ", ".join(f"{name} {printable(value)}" for name, value in features.items() if value)
        lines.append(f"  {date:10}  {_cut(title)}  {said}".rstrip())
    for condition, matches in zip(view.conditions, view.matches):
        lines.append(f"{printable(spoken(condition)):{TITLE_WIDTH + 5}} {'similarity':>10} {'share':>8}")
        lines += [
            f"{rank:4}. {_cut(match.title)}{match.similarity:10.3f} {match.share:8.2%}{' seen' * match.seen}"
            for rank, match in enumerate(matches, start=1)
        ]
    return "\n".join(lines)


def show_on_page(path: Path, lum: str, view: UserView) -> Path:
    """Writes a view as an HTML page; returns its path. lum: the run that answered."""
    lists = [(spoken(condition), matches) for condition, matches in zip(view.conditions, view.matches)]
    return write_page(path, "show_user.html.j2", lum=lum, view=view, lists=lists)


def _cut(title: str) -> str:
    title = printable(title)
    return f"{title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 1] + '…':{TITLE_WIDTH}}"


def _table(data: PreparedData, feature: str) -> str:
    return data.schema.features[feature].table or feature
