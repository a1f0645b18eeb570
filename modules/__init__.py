"""LUM's building blocks as plain nn.Modules and functions: no files, no logging, no process groups.

    from lumrec.modules import KnowledgeFusion, LargeUserModel

Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "lumrec.modules":
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package 'lumrec.modules': write "
        "`from lumrec.modules import ...` (a second copy of each class would exist otherwise)"
    )

if TYPE_CHECKING:  # `X as X` exports a name, for type checkers
    from lumrec.modules.knowledge import KnowledgeFusion as KnowledgeFusion
    from lumrec.modules.large_user_model import LargeUserModel as LargeUserModel
    from lumrec.modules.large_user_model import Pack as Pack
    from lumrec.modules.losses import info_nce as info_nce
    from lumrec.modules.rankers.dien import Dien as Dien
    from lumrec.modules.rankers.din import Din as Din
    from lumrec.modules.rankers.dlrm import Dlrm as Dlrm
    from lumrec.modules.rankers.sim import Sim as Sim
    from lumrec.modules.rankers.twin import Twin as Twin
    from lumrec.modules.retrievers.edb import TwoTower as TwoTower
    from lumrec.modules.tokens import TokenEncoder as TokenEncoder
    from lumrec.modules.torchrec_models import KnowledgeModel as KnowledgeModel
    from lumrec.modules.user_encoder import UserEncoder as UserEncoder

_FILES = {
    "Dien": "rankers.dien",
    "Din": "rankers.din",
    "Dlrm": "rankers.dlrm",
    "KnowledgeFusion": "knowledge",
    "KnowledgeModel": "torchrec_models",
    "LargeUserModel": "large_user_model",
    "Pack": "large_user_model",
    "Sim": "rankers.sim",
    "TokenEncoder": "tokens",
    "Twin": "rankers.twin",
    "TwoTower": "retrievers.edb",
    "UserEncoder": "user_encoder",
    "info_nce": "losses",
}
__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'lumrec.modules' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"lumrec.modules.{_FILES[name]}"), name)
