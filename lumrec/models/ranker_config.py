"""The rankers, and their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lumrec.models.lum import MOST_WIDTH
from lumrec.modules.rankers.base import Ranker
from lumrec.modules.rankers.dien import Dien
from lumrec.modules.rankers.din import Din
from lumrec.modules.rankers.dlrm import Dlrm
from lumrec.modules.rankers.sim import Sim
from lumrec.modules.rankers.twin import Twin
from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting, share
from lumrec.run.typed_yaml import defaults

MOST_LAYERS = 64
MOST_EVENTS = 2**20


@dataclass(frozen=True)
class DinConfig:
    """DIN's activation unit; see lumrec/modules/rankers/din.py.

    activation_dim: width of its hidden layer.
    softmax: weights of a history add up to 1; the paper's do not.
    """

    activation_dim: int = count(36, least=1, most=MOST_WIDTH)
    softmax: bool = False


@dataclass(frozen=True)
class DlrmConfig:
    """DLRM: Embedding + MLP with the pooled history.

    cross_dim: width of the cross features, which are dot products of its fields; 0 = none.
    """

    cross_dim: int = count(0, most=MOST_WIDTH)


@dataclass(frozen=True)
class DienConfig:
    """DIEN; see lumrec/modules/rankers/dien.py.

    auxiliary_weight: weight of the auxiliary loss, which trains the states on the next event; 0 = none.
    """

    auxiliary_weight: float = setting(1.0, least=0, most=1e6)


@dataclass(frozen=True)
class SimConfig:
    """SIM; see lumrec/modules/rankers/sim.py.

    search: "hard" finds the latest events of the target's category, "soft" those most similar to the target.
    category: item feature that the hard search compares (its first value); "" = the first multi-valued item feature.
    auxiliary_weight: weight of the task that trains the soft search.
    num_searched: events that the search finds at most.
    num_heads: heads of the attention to these events.
    head_dim: width of each head.
    num_recent: latest events that make up the short-term interest.
    """

    search: Literal["soft", "hard"] = "soft"
    category: str = ""
    auxiliary_weight: float = setting(1.0, least=0, most=1e6)
    num_searched: int = count(50, least=1, most=MOST_EVENTS)
    num_heads: int = count(4, least=1, most=1024)
    head_dim: int = count(16, least=1, most=1024)
    num_recent: int = count(16, most=MOST_EVENTS)

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        if self.search == "soft" and not self.auxiliary_weight:
            raise UserError(f"{at}auxiliary_weight: got 0, and without it SIM's soft search learns nothing; raise it")
        if self.search == "soft" and self.category:
            raise UserError(f"{at}category={self.category} has no effect with {at}search=soft: only hard reads it")


@dataclass(frozen=True)
class TwinConfig:
    """TWIN; see lumrec/modules/rankers/twin.py.

    category: item feature whose earlier events of the user are counted for each event (its first value); "" = the first
        multi-valued item feature.
    num_searched: events that the search finds at most.
    num_heads: heads of the search and of the attention.
    head_dim: width of each head.
    """

    category: str = ""
    num_searched: int = count(50, least=1, most=MOST_EVENTS)
    num_heads: int = count(4, least=1, most=1024)
    head_dim: int = count(16, least=1, most=1024)


def registered(ranker: type[Ranker], section: type) -> Any:
    """A field that registers a ranker: its class, whose arguments are the settings of its section."""
    return field(default_factory=section, metadata={"ranker": ranker})


@dataclass(frozen=True)
class RankerSections:
    """Every ranker, registered here and nowhere else: the field's name is the ranker's in `rank.model`."""

    din: DinConfig = registered(Din, DinConfig)
    dlrm: DlrmConfig = registered(Dlrm, DlrmConfig)
    dien: DienConfig = registered(Dien, DienConfig)
    sim: SimConfig = registered(Sim, SimConfig)
    twin: TwinConfig = registered(Twin, TwinConfig)


RANKERS: dict[str, type[Ranker]] = {each.name: each.metadata["ranker"] for each in dataclasses.fields(RankerSections)}
if TYPE_CHECKING:
    RankerName = str
else:
    RankerName = Literal[tuple(RANKERS)]


@dataclass(frozen=True)
class RankerConfig(RankerSections):
    """A ranker, without how it is trained. Each ranker has a section; only that of `model` is read.

    model: the ranker; see lumrec/modules/rankers.
    knowledge: "none", "direct" (the LUM's answers as features), "matching" (their similarity to the target) or "both".
    knowledge_attention: in any of these modes, add the mean of the answers weighted by their match with the target.
    knowledge_dim: width to which answers are projected.
    knowledge_dropout: share of the training rows whose knowledge is withheld.
    statistics: "all", "user" (none that need other users' labels) or "none"; see docs/concepts.md. The schema's dense
        features are read too.
    leave_out: features of the schema that the ranker does not read.
    max_history: events before the row; SIM and TWIN are made for long histories, such as 1024.
    hidden_dims: hidden layers of the over-arch.
    dropout: dropout of the over-arch.
    activation: activation of the over-arch, and of the activation unit of DIN and SIM.
    token_l2: weight of DIN's mini-batch aware regularisation, for any ranker; 0 = none.
    """

    model: RankerName = "din"
    knowledge: Literal["none", "direct", "matching", "both"] = "none"
    knowledge_attention: bool = False
    knowledge_dim: int = count(32, least=1, most=MOST_WIDTH)
    knowledge_dropout: float = share(0.0)
    statistics: Literal["all", "user", "none"] = "all"
    leave_out: list[str] = field(default_factory=list)
    max_history: int = count(50, most=MOST_EVENTS)
    hidden_dims: list[int] = count(lambda: [200, 80], least=1, most=MOST_WIDTH)
    dropout: float = share(0.1)
    activation: Literal["relu", "prelu", "dice"] = "prelu"
    token_l2: float = setting(0.0, least=0, most=1e6)

    @property
    def own(self) -> Any:
        """The section of the chosen ranker."""
        return getattr(self, self.model)

    @property
    def category(self) -> str:
        """The item feature that the chosen ranker uses as category; "" where it uses none, or the first one."""
        return getattr(self.own, "category", "")

    @property
    def takes_a_category(self) -> bool:
        """Whether the chosen ranker uses an item feature as category; SIM does only for its hard search."""
        return hasattr(self.own, "category") and getattr(self.own, "search", "hard") == "hard"

    def unread(self) -> dict[str, str]:
        """Fields that the chosen ranker does not read → the field whose value decides that."""
        others = {name: "model" for name in RANKERS if name != self.model}
        return others | dict.fromkeys(_unread_of_knowledge(self.knowledge, self.knowledge_attention), "knowledge")

    @classmethod
    def earlier_keys(cls, stored: Mapping[str, Any]) -> dict[str, str | None]:
        """Keys of earlier versions, when rankers had no sections → today's keys; None: it had no effect."""
        model, knowledge = str(stored.get("model", cls.model)), str(stored.get("knowledge", cls.knowledge))
        sections = defaults(RankerSections)
        found: dict[str, str | None] = dict.fromkeys(name for section in sections.values() for name in section)
        found |= {name: f"{model}.{name}" for name in sections.get(model, ())}
        if model == "sim" and str(stored.get("search")) != "hard":
            found["category"] = None
        attention = str(stored.get("knowledge_attention", "")).lower() == "true"
        return found | dict.fromkeys(_unread_of_knowledge(knowledge, attention))

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        check_depth(f"{at}hidden_dims", self.hidden_dims)


def _unread_of_knowledge(knowledge: str, attention: bool) -> tuple[str, ...]:
    if knowledge == "none":
        return ("knowledge_attention", "knowledge_dim", "knowledge_dropout")
    return ("knowledge_dim",) if knowledge == "matching" and not attention else ()


def check_depth(key: str, hidden_dims: Sequence[int]) -> None:
    """Raises UserError for more layers than any over-arch has."""
    if len(hidden_dims) > MOST_LAYERS:
        raise UserError(f"{key}: got {len(hidden_dims)} layers; expected at most {MOST_LAYERS}")
