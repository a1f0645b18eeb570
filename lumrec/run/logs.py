"""Configures the log lines of a stage."""

from __future__ import annotations

import logging
import os
import warnings

from lumrec.run.printable import PrintableFormatter


def rank() -> int:
    """This process's rank as set by torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def start_logging() -> None:
    """Logs lines with the time on rank 0, and only warnings on the other ranks."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.WARNING,
        force=True,  # imported libraries may have added handlers
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("torchrec", "torch", "fsspec", "matplotlib", "urllib3", "faiss"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Warnings that TorchRec 1.8 raises at every use under torch 2.13, whatever the caller does.
    for message in (".*broadcast_buffers", "Please use DTensor", "HeuristicalStorageReservation"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(is_news)
    logging.getLogger().addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """False for messages that torch and TorchRec log at every use.

    The last two: TorchRec logs an error for tables that two models share in one DMP, but handles them correctly.
    """
    repeated = ("is_fx_tracing", "is already in cache", "already collected")
    return not any(text in record.getMessage() for text in repeated)
