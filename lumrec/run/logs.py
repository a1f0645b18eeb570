"""Log lines of a stage."""

from __future__ import annotations

import logging
import os
import warnings

from lumrec.run.printable import PrintableFormatter


def rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def start_logging() -> None:
    """Log lines with the time on rank 0; only warnings on the other ranks."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.WARNING,
        force=True,  # libraries that are imported by now may have put a handler of their own
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("torchrec", "torch", "fsspec", "matplotlib", "urllib3", "faiss"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What TorchRec 1.8 says at every use under torch 2.13, whatever the caller does.
    for message in (".*broadcast_buffers", "Please use DTensor", "HeuristicalStorageReservation"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(is_news)
    logging.getLogger().addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """False for what torch and TorchRec log at every use; "already …": for tables that two models share in one DMP,
    TorchRec logs as an error what it then does right.
    """
    repeated = ("is_fx_tracing", "is already in cache", "already collected")
    return not any(text in record.getMessage() for text in repeated)
