"""lumrec: the Large User Model (arXiv 2502.08309) as a recommender stack on TorchRec.

    import lumrec

    config = lumrec.load_config("my.yaml", ["model.dim=64"])
    lum, builder, trained = lumrec.fit_lum(config)    # or lumrec.load_lum("runs/my-pretrain")
    query = lumrec.GroupQuery(lum, builder, [{"feedback": "like"}], max_events=trained.model.max_events)
    ranker, rows, run = lumrec.load_ranker("runs/my-rank")
    logits = ranker(rows.batch(numpy.array([0, 5])))
    scorer = lumrec.Scorer.open("runs/my-rank-bundle", store="runs/my-query", state="runs/my-user_state")
    probabilities = scorer.score(user="42", items=["7", "9"])

What is listed here is the public Python API; each name is imported when it is first used. `lumrec.modules` has the
nn.Modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `X as X` exports a name, for type checkers
    from lumrec.data.prepared import PreparedData as PreparedData
    from lumrec.experiments.config import Config as Config
    from lumrec.experiments.config import load_config as load_config
    from lumrec.experiments.steps import build_knowledge as build_knowledge
    from lumrec.experiments.steps import fit_lum as fit_lum
    from lumrec.experiments.steps import fit_ranker as fit_ranker
    from lumrec.experiments.steps import prepare_data as prepare_data
    from lumrec.knowledge.store import Knowledge as Knowledge
    from lumrec.knowledge.store import KnowledgeStore as KnowledgeStore
    from lumrec.models.lum import load_lum as load_lum
    from lumrec.models.ranker import load_ranker as load_ranker
    from lumrec.query.group_query import GroupQuery as GroupQuery
    from lumrec.run.errors import MissingFileError as MissingFileError
    from lumrec.run.errors import UserError as UserError
    from lumrec.serving.requests import Event as Event
    from lumrec.serving.requests import ScoreRequest as ScoreRequest
    from lumrec.serving.scorer import Scorer as Scorer
    from lumrec.serving.state import UserState as UserState

__version__ = "0.1.0"
_MODULES = {
    "Config": "lumrec.experiments.config",
    "Event": "lumrec.serving.requests",
    "GroupQuery": "lumrec.query.group_query",
    "Knowledge": "lumrec.knowledge.store",
    "KnowledgeStore": "lumrec.knowledge.store",
    "MissingFileError": "lumrec.run.errors",
    "PreparedData": "lumrec.data.prepared",
    "ScoreRequest": "lumrec.serving.requests",
    "Scorer": "lumrec.serving.scorer",
    "UserError": "lumrec.run.errors",
    "UserState": "lumrec.serving.state",
    "build_knowledge": "lumrec.experiments.steps",
    "fit_lum": "lumrec.experiments.steps",
    "fit_ranker": "lumrec.experiments.steps",
    "load_config": "lumrec.experiments.config",
    "load_lum": "lumrec.models.lum",
    "load_ranker": "lumrec.models.ranker",
    "prepare_data": "lumrec.experiments.steps",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lumrec' has no attribute {name!r}; it has: {', '.join(__all__)}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if (error.name or "lumrec").startswith("lumrec"):
            raise
        raise ImportError(f"lumrec.{name} needs {error.name}: pip install 'lumrec[stages]', or make setup") from error
    return getattr(module, name)
