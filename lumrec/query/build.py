"""Builds one version of the knowledge store: asks the LUM about users and rows, unit by unit."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumrec.batches.windows import AnsweringWindows, Windows, behind
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.splits import user_fold
from lumrec.knowledge.digests import user_index
from lumrec.knowledge.forget import drop_forgotten
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.knowledge.records import decode, encode, user_key_bytes
from lumrec.knowledge.refresh import Earlier, take_over
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.models.lum import ModelConfig, condition_features
from lumrec.query.group_query import GroupQuery, answered_rows, packs, row_windows, serving_windows
from lumrec.run.distributed import rank, world_size
from lumrec.run.folder import RunFolder

logger = logging.getLogger(__name__)
LOG_EVERY_S = 30.0


class Unit(NamedTuple):
    """The windows of one kind ("rows" or "users") that are asked, written and marked as finished together."""

    name: str
    kind: str
    windows: AnsweringWindows


NOTHING = behind(Windows(*(torch.zeros(0, dtype=torch.int64) for _ in range(3))))


class Build:
    """The build of one version on this rank: finds the units that are left, asks them and writes the answers."""

    def __init__(
        self,
        data: PreparedData,
        identity: dict[str, Any],
        run_folder: RunFolder,
        model: ModelConfig,
        earlier: Earlier | None,
        run_id: str,
    ) -> None:
        self.data, self.identity, self.run_folder, self.earlier = data, identity, run_folder, earlier
        self.fold_U = user_fold(data.user_keys(), len(identity["lums"]))
        self.user_keys = data.user_keys()
        self.length_U = np.diff(data.user_offsets)
        read = [*features_by_role(data.schema, "item"), *features_by_role(data.schema, "feedback")]
        self.index_U = user_index(data, [*read, *condition_features(model, data.schema)])
        drop_forgotten(self.index_U, self.fold_U, identity.get("forgotten", []))
        self.answered_U = (self.length_U > 0) & (self.index_U["key"] != b"")
        self.earlier_U = self._unchanged() if earlier else np.full(data.num_users, -1)
        self.writer = KnowledgeWriter(
            run_folder.path,
            identity,
            num_events=data.num_events,
            num_users=data.num_users,
            num_items=data.num_items,
            basis=earlier.folder.name if earlier else "",
            made_by=run_id,
        )
        self.answers, self.seconds = 0, 0.0

    def _unchanged(self) -> np.ndarray:
        """Each user's index in the earlier version if its answers are still valid, int64 [U]; -1 = has to be asked."""
        assert self.earlier is not None
        earlier_U = self.earlier.find(self.index_U["key"])
        same_U = (earlier_U >= 0) & (self.earlier.index_U["history"][earlier_U] == self.index_U["history"])
        return np.where(same_U & self.answered_U, earlier_U, -1)

    def pending(self, lum: int) -> list[Unit]:
        """Units of LUM number `lum` that no build has finished, the same list on every rank."""
        asked_U = (self.fold_U == lum) & self.answered_U & (self.earlier_U < 0)
        users = torch.from_numpy(np.flatnonzero(asked_U))
        window, kinds = self.identity["window"], {}
        if self.identity["rows"]:
            kinds["rows"] = row_windows(self.data, users, **window)
        if self.identity["users"]:
            kinds["users"] = serving_windows(self.data, users, max_events=window["max_events"])
        units = [Unit(f"items/{lum}", "items", NOTHING)]
        for kind, answering in kinds.items():
            parts = packs(
                answering,
                num_conditions=len(self.identity["conditions"]),
                tokens_per_pack=self.identity["tokens_per_pack"],
            )
            units += [Unit(f"{kind}/{lum}/{n}", kind, answering.take(index)) for n, index in enumerate(parts)]
        return [unit for unit in units if unit.name not in self.writer.finished]

    def ask(self, lum: int, units: list[Unit], query: GroupQuery) -> None:
        """Asks LUM number `lum` for this rank's share of the units. Collective: all ranks ask equally often."""
        e_ID = self._as_stored(query.items(), "items")
        if rank() == 0:
            self.writer.write_items(lum, e_ID)
            if self.earlier:
                taken_U = np.flatnonzero((self.earlier_U >= 0) & (self.fold_U == lum))
                take_over(
                    self.writer, self.earlier, lum, self.earlier_U[taken_U], self.index_U["first_row"][taken_U], e_ID
                )
            self.writer.commit(f"items/{lum}")
        units = [unit for unit in units if unit.kind != "items"]
        mine = units[rank() :: world_size()]
        progress = Progress(self.run_folder, f"query {lum + 1}/{len(self.identity['lums'])}", len(mine))
        for turn in range(-(-len(units) // world_size())):
            start = time.perf_counter()
            unit = mine[turn] if turn < len(mine) else Unit("", "", NOTHING)
            o_RND = self._as_stored(query.answer(unit.windows))
            log_z_RN = None
            if self.identity["log_normalizer"]:
                log_z_RN = log_normalizer(o_RND.flatten(0, 1), e_ID).view(o_RND.shape[:2])
            if unit.kind == "rows":
                row_E, answer_E = answered_rows(self.data, unit.windows)
                self.writer.write_rows(row_E.numpy(), o_RND[answer_E], None if log_z_RN is None else log_z_RN[answer_E])
            elif unit.kind == "users":
                self._write_users(unit.windows, lum, o_RND, log_z_RN)
            if unit.name:
                self.writer.commit(unit.name)
            self.answers += o_RND.shape[0] * o_RND.shape[1]
            self.seconds += time.perf_counter() - start
            progress.advance(o_RND.shape[0] * o_RND.shape[1])
        progress.close()

    def _as_stored(self, x: Tensor, what: str = "answers") -> Tensor:
        """`x` as readers will see it, rounded for storage, so that log_z is computed from exactly these values."""
        return torch.from_numpy(decode(*encode(x, self.identity["dtype"], what=what)))

    def _write_users(self, asked: AnsweringWindows, lum: int, o_BND: Tensor, log_z_BN: Tensor | None) -> None:
        users = asked.windows.user_W.numpy()
        record_B = self.writer.user_records(
            o_BND,
            log_z_BN,
            asked_at=int(time.time()),
            last_event_at=self.data.timestamp[self.data.user_offsets[users + 1] - 1],
            num_events=self.length_U[users],
            num_seen=asked.windows.length_W.numpy(),
            fold=lum,
        )
        self.writer.write_users([user_key_bytes(self.user_keys[user]) for user in users], record_B)

    def publish(self) -> dict[str, Any]:
        """Publishes the version and returns its manifest."""
        if rank() == 0:
            self.writer.write_item_keys(self.data.item_keys())
            self.writer.write_user_index(self.fold_U, self.index_U)
        answered, taken = int(self.answered_U.sum()), int((self.earlier_U >= 0).sum())
        counts: dict[str, int] = {"users_asked": answered - taken, "users_taken_over": taken}
        if self.earlier:
            gone_U = (self.earlier.index_U["num_events"] > 0) & (self.earlier.index_U["key"] != b"")
            earlier_U = self.earlier.find(self.index_U["key"][self.answered_U])
            gone_U[earlier_U[earlier_U >= 0]] = False
            counts["users_removed"] = int(gone_U.sum())
        if self.identity["rows"]:
            # A user's first moment has no history, so the LUM is not asked about it.
            has_history_E = self.data.before > self.data.user_offsets[self.data.user]
            rows = int((has_history_E & self.answered_U[self.data.user]).sum())
            counts |= {"rows": rows, "rows_absent": self.data.num_events - rows}
        if self.identity["users"]:
            counts |= {"users": answered, "users_absent": self.data.num_users - answered}
        answers_per_s = self.answers / self.seconds if self.seconds else None
        return self.writer.publish(
            {"counts": counts, "built_at": int(time.time()), "answers_per_s": answers_per_s},
        )


class Progress:
    """A progress bar on rank 0's terminal, otherwise a log line every half minute; the rate goes to metrics.jsonl."""

    def __init__(self, run_folder: RunFolder, name: str, num_units: int) -> None:
        self.run_folder, self.name, self.num_units = run_folder, name, num_units
        self.bar = tqdm(total=num_units, desc=name, unit="pack", disable=rank() != 0 or not sys.stderr.isatty())
        self.units = self.answers = 0
        self.start = self.logged = time.perf_counter()

    def advance(self, answers: int) -> None:
        self.units, self.answers = self.units + 1, self.answers + answers
        rate = self.answers / (time.perf_counter() - self.start)
        self.bar.update()
        self.bar.set_postfix_str(f"{rate:,.0f} answers/s")
        if time.perf_counter() - self.logged > LOG_EVERY_S and self.units < self.num_units:
            self._line(rate)

    def close(self) -> None:
        self.bar.close()
        if self.units:
            self._line(self.answers / (time.perf_counter() - self.start))

    def _line(self, rate: float) -> None:
        self.logged = time.perf_counter()
        self.run_folder.log(self.units, **{f"{self.name}/answers_per_s": rate})
        if self.bar.disable:
            logger.info("%s: %d/%d packs, %s answers/s", self.name, self.units, self.num_units, f"{rate:,.0f}")
