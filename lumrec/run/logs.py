"""Log lines of a stage."""

from __future__ import annotations

import logging
import os

from lumrec.run.printable import PrintableFormatter


def rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def start_logging() -> None:
    """Log lines with the time on rank 0; warnings alone on the other ranks."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.WARNING,
        force=True,  # libraries that are imported by now may have put a handler of their own
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("torchrec", "torch", "fsspec", "matplotlib", "urllib3", "faiss"):
        logging.getLogger(name).setLevel(logging.WARNING)
