"""lumrec: the Large User Model (arXiv 2502.08309) as a recommender stack on TorchRec."""

from lumrec.errors import MissingFileError, UserError

__all__ = ["MissingFileError", "UserError"]
__version__ = "0.1.0"
