"""Settings of the server, and the token that protects it."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lumrec.data.common import Common
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.limits import count, setting

TOKEN_VARIABLE = "LUMREC_TOKEN"
SHORTEST_TOKEN = 16  # characters


class Places(NamedTuple):
    """What is served. store, state: folders or redis:// places; "" = none. log: None = none. lums: the settings whose
    inputs are the LUMs to ask and the data they were trained on; None = none. trust_compiled: see ServeConfig.
    """

    bundle: Path
    store: str
    state: str
    log: Path | None = None
    lums: Common | None = None
    trust_compiled: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """The server of a bundle: what it serves, where it listens, and its limits.

    bundle: run name or folder of the bundle; "" = "<run>-bundle", where run names the ranker ("" = "<name>-rank").
    store: run name, folder or redis:// place of the knowledge store; "" = inputs.knowledge, or the store that the
        ranker was trained with. Read only where the bundle was trained with knowledge.
    state: run name, folder or redis:// place of the users' state; "" = "<run>-user_state" if it
        is there, else every user is unknown.
    lums: run names of the LUMs that /v1/ask asks while a request waits, those that the store was made by; [] = none. It
        needs inputs.prepared, the data they were trained on, and a state.
    trust_compiled: serve a compiled bundle, which is machine code; see docs/security.md.
    host: address to listen on. Any but a loopback address needs a token.
    port: 0 = one that is free.
    token_file: file that holds the token which requests must bring; "" = the environment variable LUMREC_TOKEN.
    workers: processes that share the port. Each has its own queue.
    max_candidates: items, or events, of one request.
    max_body_kib: size of a request's body.
    max_batch_candidates: items that are scored in one call of the ranker.
    max_batch_ms: a call takes no more waiting requests than are likely to be scored within it, one at least.
    queue: requests that wait in one process; further ones, and those that would wait too long, are refused with 503.
    timeout_ms: a request that has no answer by then gets 504. A request may ask for less.
    drain_s: seconds that running requests get to finish after SIGTERM.
    reload_s: seconds between two looks for a new version of the bundle, the store or the state.
    page: the page at /, which shows what the LUM changes for a user; it takes time of the ranker.
    log: run name or folder for what was scored and the events that followed, as rows to train on (data.source=served);
        "" = none.
    log_rows: rows of one file of the log.
    log_every_s: seconds after which a file is written at the latest. A killed server loses the rows since the last.
    """

    bundle: str = ""
    store: str = ""
    state: str = ""
    lums: list[str] = field(default_factory=list)
    trust_compiled: bool = False
    host: str = "127.0.0.1"
    port: int = count(8000, most=65_535)
    token_file: str = ""
    workers: int = count(1, least=1, most=1024)
    max_candidates: int = count(1000, least=1, most=1_000_000)
    max_body_kib: int = count(256, least=1, most=1 << 20)
    max_batch_candidates: int = count(4000, least=1, most=10_000_000)
    max_batch_ms: float = setting(50.0, least=0, most=3_600_000)
    queue: int = count(256, least=1, most=1_000_000)
    timeout_ms: float = setting(1000.0, least=1, most=3_600_000)
    drain_s: int = count(30, most=86_400)
    reload_s: float = setting(1.0, least=0.01, most=86_400)
    page: bool = True
    log: str = ""
    log_rows: int = count(10_000, least=1, most=10_000_000)
    log_every_s: float = setting(60.0, least=0.1, most=86_400)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def token(self) -> str:
        """The token that requests must bring; "" if none is needed.

        Raises UserError where an address that others can reach has no token, MissingFileError without the file.
        """
        if self.token_file:
            try:
                token = Path(self.token_file).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                raise MissingFileError(f"serve.token_file: there is no file {self.token_file}") from None
            source = f"the file {self.token_file}"
        else:
            token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the environment variable {TOKEN_VARIABLE}"
        if not token and (self.token_file or not self.is_loopback):
            raise UserError(
                f"serve.host={self.host} needs a token, and {source} has none: write a long random text into a file "
                "that only you can read (openssl rand -hex 32), and name it by serve.token_file"
            )
        if token and (len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token):
            raise UserError(
                f"{source} holds {len(token)} characters; expected a token of at least {SHORTEST_TOKEN} ASCII letters "
                "and digits (openssl rand -hex 32)"
            )
        return token
