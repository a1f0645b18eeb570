"""Step 2 as a stage: asks the LUM about every user and every row of the log, and publishes the answers (LUM 4.2)."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumrec import limits
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.sequences import AnsweringWindows, Windows, behind
from lumrec.data.splits import moment_of_share, user_fold
from lumrec.errors import UserError
from lumrec.evaluation.answers import rank_by_answers
from lumrec.limits import count
from lumrec.query.conditions import MAX_CONDITIONS, Conditions, default_conditions, expand
from lumrec.query.forget import drop_forgotten, forgotten_among
from lumrec.query.group_query import (
    GroupQuery,
    answered_rows,
    default_stride,
    log_normalizer,
    packs,
    row_windows,
    serving_windows,
)
from lumrec.query.history import key_digests, user_index
from lumrec.query.records import decode, encode, user_key_bytes
from lumrec.query.refresh import Earlier, find_earlier, take_over
from lumrec.query.store import MANIFEST, Knowledge, check_files, identity_of, read_manifest, version_name
from lumrec.query.writer import KnowledgeWriter, full_disk_told, remove_others
from lumrec.train.lum import ModelConfig, check_lum_fits, condition_features, load_lum, open_lum_run
from lumrec.train.parallel import init_distributed, rank, world_size
from lumrec.train.run import RunFolder, on_rank_zero

if TYPE_CHECKING:
    from lumrec.config import Config

logger = logging.getLogger(__name__)
LOG_EVERY_S = 30.0
# In a version's identity: what was built by another rule is another version, of which nothing is taken over.
ROWS_SEE = "events before their moment"
SERVED = (MANIFEST, "knowledge-*")  # what readers open until the next version is published, after overwrite=true too


@dataclass(frozen=True)
class QueryConfig:
    """Step 2: what is asked, about whom, and how the answers are stored.

    conditions: raw values by condition feature, such as [{feedback: like}, {feedback: dislike, category: shoes}]; [{}]
        asks without any. Empty: each value of each wish of the schema. A value may stand for several, and each is a
        condition of its own: "*" each value that training events have, the most frequent first; "top 3" the three most
        frequent of the history asked, other ones for each user and moment ("top 2 of 3" is the second of them alone; a
        history with fewer is asked without). With several such features every combination is asked. In a multi-valued
        feature, red|shoes is one condition with two values.
    max_conditions: conditions that may come of it; more is an error.
    rows: ask for every row of the log, with the history before its moment (what rankers train on).
    users: ask for every user, after the last event (what serving reads).
    stride: a history longer than model.max_events is read in windows that begin every `stride` events, and a row is
        asked with at least max_events - stride events before it; 0 = half a window.
    log_normalizer: store log Σ over the catalogue of exp(similarity), which makes log-probabilities of similarities.
    dtype: float16 | float32 | int8 (with a scale for each vector), of what is stored.
    refresh_from: knowledge run whose answers are taken over for users whose history is as it was; "" = this run's own
        version in force, where it has one.
    tokens_per_pack: tokens and queries of one forward pass; on a CPU what stays in a core's cache is fastest, on a GPU
        more.
    """

    conditions: List[Dict[str, str]] = field(default_factory=list)
    max_conditions: int = count(MAX_CONDITIONS, least=1, most=65_536)
    rows: bool = True
    users: bool = True
    stride: int = count(0, most=2**20)
    log_normalizer: bool = True
    dtype: Literal["float16", "float32", "int8"] = "float16"
    refresh_from: str = ""
    tokens_per_pack: int = count(8192, least=1)

    def check(self, at: str) -> None:
        """Raises UserError where nothing is asked (`at`: the section, with a dot)."""
        if not (self.rows or self.users):
            raise UserError(f"{at}rows and {at}users are both false: there is nothing to ask about; set one of them")


class AskedLum(NamedTuple):
    """A finished LUM run: its name, the fold "k/K" that it has not seen ("" = it saw all users), and what it is."""

    run: str
    fold: str
    fingerprint: str
    trained: Config


class Unit(NamedTuple):
    """What is asked, written and marked as finished in one go: windows of one kind ("rows" or "users")."""

    name: str
    kind: str
    windows: AnsweringWindows


NOTHING = behind(Windows(*(torch.zeros(0, dtype=torch.int64) for _ in range(3))))


def run(config: Config) -> dict[str, float | str]:
    """Publishes the knowledge of `config` in `<runs_dir>/<run>` and returns what stands in its result.json.

    Among it "test/lum_auc": how well the answers rank the labels by themselves (evaluation/answers.py).

    The answers are kept where they were made from the same data, LUMs and settings; a killed build is continued; else
    the next version is built beside the old one, which can be read meanwhile. Raises MissingFileError for a missing
    input (with the command that makes it), UserError for inputs that do not belong together.
    """
    limits.check(config)
    device = init_distributed(threads=config.threads)
    data = open_or_prepare(config, make=False)
    lums = find_lums(config, data)
    identity = _identity(config, data, lums)
    run_folder = RunFolder.create(config, "query", told=False, keep=SERVED)
    run_id = on_rank_zero(lambda: run_folder.id)
    manifest = on_rank_zero(lambda: _published(run_folder, identity, run_id))
    if manifest and run_folder.finished and run_folder.result().get("version") == manifest["folder"]:
        logger.info("%s is up to date, skipping (overwrite=true makes it again)", run_folder.path)
        result = run_folder.result()
        run_folder.close()
        return result

    start = time.perf_counter()
    if manifest is None:
        manifest = _build(config, data, lums, identity, run_folder, run_id, device)
    result = {
        "dataset": data.manifest["dataset"],
        "version": manifest["folder"],
        "hazard": manifest["hazard"],
        "lums": len(lums),
        "conditions": len(manifest["conditions"]),
        "dim": manifest["dim"],
        **manifest["counts"],
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "answers_per_s": manifest["answers_per_s"] or float("nan"),
    }
    if config.query.rows:
        result |= rank_by_answers(Knowledge.open(run_folder.path, data), data)
    result["wall_s"] = time.perf_counter() - start
    run_folder.finish(result)
    asked = ", ".join(spoken(condition) for condition in manifest["conditions"])
    logger.info(
        "%s: asked %s for %s (%s)", run_folder.path, ", ".join(lum.run for lum in lums), asked, manifest["hazard"]
    )
    return result


def _build(
    config: Config,
    data: PreparedData,
    lums: list[AskedLum],
    identity: dict[str, Any],
    run_folder: RunFolder,
    run_id: str,
    device: torch.device,
) -> dict[str, Any]:
    """Asks the LUMs and publishes the answers; the manifest of the version."""
    earlier_path = Path(config.runs_dir) / config.query.refresh_from if config.query.refresh_from else run_folder.path
    own = earlier_path == run_folder.path
    earlier = find_earlier(earlier_path, identity, required=not own, made_by=run_id if own else None)
    with full_disk_told(run_folder.path):
        job = _Job(data, identity, run_folder, lums[0].trained.model, earlier, run_id)
        for place, lum in enumerate(lums):
            if pending := job.pending(place):
                dmp, builder, _ = load_lum(config, lum.run, data, device=device)
                query = GroupQuery(
                    dmp,
                    builder,
                    identity["conditions"],
                    **identity["window"],
                    tokens_per_pack=identity["tokens_per_pack"],
                    max_conditions=config.query.max_conditions,
                )
                job.ask(place, pending, query)
        return job.publish()


def find_lums(config: Config, data: PreparedData) -> list[AskedLum]:
    """The LUM runs of `config.inputs.lums`: LUM k is the one that has not seen fold k; or the only one, of all users.

    Raises MissingFileError where a run is missing, UserError where the runs are not the K folds of K, were trained on
    other data than `data`, or differ in their model settings.
    """
    names = list(config.inputs.lums) or [f"{config.name}-pretrain"]
    lums = [_read_lum(config, name, data) for name in names]
    if len(lums) == 1 and not lums[0].fold:
        return lums
    folds = {lum.fold: lum for lum in lums}
    expected = [f"{place}/{len(lums)}" for place in range(len(lums))]
    if sorted(folds) != sorted(expected) or len(lums) == 1:
        got = ", ".join(f"{lum.run} has fold={lum.fold or '(none)'}" for lum in lums)
        raise UserError(
            f"inputs.lums names {len(lums)} runs for cross-fitting, so they must be pre-trained with fold="
            f"{', fold='.join(expected)}, one each; but {got}. One LUM alone must be one without a fold"
        )
    models = {lum.run: lum.trained.model for lum in lums}
    if any(model != models[names[0]] for model in models.values()):
        raise UserError(f"the LUMs {names} have different settings of `model`; pre-train all folds with the same ones")
    return [folds[fold] for fold in expected]


def _read_lum(config: Config, name: str, data: PreparedData) -> AskedLum:
    """What is known about a LUM run without loading it."""
    folder = Path(config.runs_dir) / name
    fold = f" fold={name.rpartition('-')[2].replace('of', '/')}" if name.rpartition("-")[2].count("of") == 1 else ""
    lum = open_lum_run(
        folder,
        missing=f"there is no finished LUM in {folder}; make it with: torchx run apps/pretrain.py "
        f"--config <your config> {shlex.quote(f'run={name}')}{fold}",
    )
    if not check_lum_fits(lum, data):
        logger.info("the LUM %s was trained on another state of this log, with the same vocabularies", name)
    return AskedLum(name, lum.config.fold, lum.fingerprint, lum.config)


def _identity(root: Config, data: PreparedData, lums: list[AskedLum]) -> dict[str, Any]:
    """Everything that decides the answers, as JSON holds it. Raises UserError for settings that cannot work."""
    config = root.query
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) != world_size():
        raise UserError("the query stage runs on one machine (its processes write the same files): use -j 1xN")
    model = lums[0].trained.model
    check_stride(config.stride, model)
    features = condition_features(model, data.schema)
    asked = config.conditions or default_conditions(data, features)
    conditions = expand(data, features, asked, max_conditions=config.max_conditions)
    Conditions(data, features, conditions)  # whatever cannot be asked is told before a LUM is loaded
    forgotten = on_rank_zero(lambda: forgotten_among(Path(root.runs_dir), key_digests(data.user_keys())))
    return {
        "data_fingerprint": data.fingerprint,
        "lums": [{"run": lum.run, "fold": lum.fold, "fingerprint": lum.fingerprint} for lum in lums],
        "hazard": _hazard(lums),
        **_learnt_until(data, lums[0].trained.pretrain.time_share),
        "conditions": conditions,
        "dim": model.dim,
        "dtype": config.dtype,
        "similarity": model.similarity,
        "temperature": model.temperature,
        "window": {"max_events": model.max_events, "stride": config.stride or default_stride(model.max_events)},
        "rows": config.rows,
        "rows_see": ROWS_SEE,
        "users": config.users,
        "log_normalizer": config.log_normalizer,
        "tokens_per_pack": config.tokens_per_pack,
        **({"forgotten": forgotten} if forgotten else {}),
    }


def check_stride(stride: int, model: ModelConfig) -> None:
    """Raises UserError for windows that would leave out events."""
    if stride >= model.max_events:
        raise UserError(
            f"query.stride: got {stride}, expected less than the LUM's model.max_events={model.max_events}; 0 is half "
            "of that"
        )


def _hazard(lums: list[AskedLum]) -> str:
    """How the LUMs are kept from the rows that rankers train on (see Knowledge)."""
    if len({lum.trained.pretrain.time_share for lum in lums}) > 1:
        raise UserError("the LUMs differ in pretrain.time_share; pre-train all folds with the same one")
    if len(lums) > 1:
        return "cross_fit"
    return "time_split" if lums[0].trained.pretrain.time_share < 1.0 else "in_sample"


def _learnt_until(data: PreparedData, share: float) -> dict[str, int]:
    """The last second that a LUM of a share of the training events has learnt from; nothing for one of all of them."""
    return {"learnt_until": moment_of_share(data.split, data.timestamp, share)} if share < 1.0 else {}


def _published(run_folder: RunFolder, identity: dict[str, Any], run_id: str) -> dict[str, Any] | None:
    """The manifest in force, where it is of this identity and this making of the run; None where it has to be built.

    Raises like `check_files` where a finished run is damaged.
    """
    path = run_folder.path
    if not (path / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(path)
        if manifest["made_by"] != run_id:  # overwrite=true: it serves until it is replaced
            return None
        if version_name(identity_of(manifest)) != version_name(identity):
            logger.info("%s was made from other inputs or settings; building the next version beside it", path)
            return None
        check_files(path / manifest["folder"], manifest["files"], checksums=False)
    except UserError:
        if run_folder.finished:
            raise
        return None
    remove_others(path, path / manifest["folder"])
    return manifest


class _Job:
    """The build of one version on this rank: which units are left, and the asking and writing of each."""

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
        """Where in the earlier version each user stands whose answers hold still, int64 [U]; -1 = has to be asked."""
        assert self.earlier is not None
        place_U = self.earlier.places(self.index_U["key"])
        same_U = (place_U >= 0) & (self.earlier.index_U["history"][place_U] == self.index_U["history"])
        return np.where(same_U & self.answered_U, place_U, -1)

    def pending(self, place: int) -> list[Unit]:
        """Units of LUM `place` that no build has finished, the same list on every rank."""
        asked_U = (self.fold_U == place) & self.answered_U & (self.earlier_U < 0)
        users = torch.from_numpy(np.flatnonzero(asked_U))
        window, kinds = self.identity["window"], {}
        if self.identity["rows"]:
            kinds["rows"] = row_windows(self.data, users, **window)
        if self.identity["users"]:
            kinds["users"] = serving_windows(self.data, users, max_events=window["max_events"])
        units = [Unit(f"items/{place}", "items", NOTHING)]
        for kind, answering in kinds.items():
            parts = packs(
                answering,
                num_conditions=len(self.identity["conditions"]),
                tokens_per_pack=self.identity["tokens_per_pack"],
            )
            units += [Unit(f"{kind}/{place}/{n}", kind, answering.take(index)) for n, index in enumerate(parts)]
        return [unit for unit in units if unit.name not in self.writer.finished]

    def ask(self, place: int, units: list[Unit], query: GroupQuery) -> None:
        """Asks LUM `place` for this rank's share of the units. Lookups are collective: all ranks ask equally often."""
        e_ID = self._as_stored(query.items(), "items")
        if rank() == 0:
            self.writer.write_items(place, e_ID)
            if self.earlier:
                taken_U = np.flatnonzero((self.earlier_U >= 0) & (self.fold_U == place))
                take_over(
                    self.writer, self.earlier, place, self.earlier_U[taken_U], self.index_U["first_row"][taken_U], e_ID
                )
            self.writer.commit(f"items/{place}")
        units = [unit for unit in units if unit.kind != "items"]
        mine = units[rank() :: world_size()]
        progress = _Progress(self.run_folder, f"query {place + 1}/{len(self.identity['lums'])}", len(mine))
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
                self._write_users(unit.windows, place, o_RND, log_z_RN)
            if unit.name:
                self.writer.commit(unit.name)
            self.answers += o_RND.shape[0] * o_RND.shape[1]
            self.seconds += time.perf_counter() - start
            progress.advance(o_RND.shape[0] * o_RND.shape[1])
        progress.close()

    def _as_stored(self, x: Tensor, what: str = "answers") -> Tensor:
        """`x` rounded as it is going to be stored, so that log_z is the sum over exactly what readers see."""
        return torch.from_numpy(decode(*encode(x, self.identity["dtype"], what=what)))

    def _write_users(self, asked: AnsweringWindows, place: int, o_BND: Tensor, log_z_BN: Tensor | None) -> None:
        users = asked.windows.user_W.numpy()
        record_B = self.writer.user_records(
            o_BND,
            log_z_BN,
            asked_at=int(time.time()),
            last_event_at=self.data.timestamp[self.data.user_offsets[users + 1] - 1],
            num_events=self.length_U[users],
            num_seen=asked.windows.length_W.numpy(),
            fold=place,
        )
        self.writer.write_users([user_key_bytes(self.user_keys[user]) for user in users], record_B)

    def publish(self) -> dict[str, Any]:
        """The manifest of the published version."""
        if rank() == 0:
            self.writer.write_item_keys(self.data.item_keys())
            self.writer.write_user_index(self.fold_U, self.index_U)
        answered, taken = int(self.answered_U.sum()), int((self.earlier_U >= 0).sum())
        counts: dict[str, int] = {"users_asked": answered - taken, "users_taken_over": taken}
        if self.earlier:
            gone_U = (self.earlier.index_U["num_events"] > 0) & (self.earlier.index_U["key"] != b"")
            place_U = self.earlier.places(self.index_U["key"][self.answered_U])
            gone_U[place_U[place_U >= 0]] = False
            counts["users_removed"] = int(gone_U.sum())
        if self.identity["rows"]:
            # A user's first moment has no history: the LUM was not asked, as it would not have been at that time.
            has_history_E = self.data.before > self.data.user_offsets[self.data.user]
            rows = int((has_history_E & self.answered_U[self.data.user]).sum())
            counts |= {"rows": rows, "rows_absent": self.data.num_events - rows}
        if self.identity["users"]:
            counts |= {"users": answered, "users_absent": self.data.num_users - answered}
        answers_per_s = self.answers / self.seconds if self.seconds else None
        return self.writer.publish(
            {"counts": counts, "built_at": int(time.time()), "answers_per_s": answers_per_s},
        )


class _Progress:
    """A progress bar on rank 0's terminal, a line every half minute where there is none; both go to metrics.jsonl."""

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


def spoken(condition: dict[str, str]) -> str:
    """A condition as it is read out: feedback=like and scenario=home."""
    return " and ".join(f"{name}={value}" for name, value in condition.items()) or "(no condition)"
