"""The query stage (step 2): asks the LUM about every user and row of the log, and publishes the answers (LUM 4.2)."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare, schema_to_read
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig
from lumrec.data.splits import moment_of_share
from lumrec.evaluation.lum_auc import rank_by_answers
from lumrec.knowledge.answers import FRESH
from lumrec.knowledge.digests import key_digests
from lumrec.knowledge.forget import forgotten_among
from lumrec.knowledge.manifest import MANIFEST, check_files, identity_of, read_manifest, version_name
from lumrec.knowledge.refresh import find_earlier
from lumrec.knowledge.store import Knowledge
from lumrec.knowledge.writer import full_disk_told, remove_others
from lumrec.models.lum import READ_BY_LUM, ModelConfig, condition_features, load_lum
from lumrec.models.lum_folds import AskedLum, find_lums, open_lums
from lumrec.query.build import Build
from lumrec.query.conditions import MAX_CONDITIONS, Conditions, default_conditions, expand, spoken
from lumrec.query.group_query import GroupQuery, default_stride
from lumrec.run.distributed import init_distributed, on_rank_zero, world_size
from lumrec.run.errors import UserError
from lumrec.run.folder import RunFolder
from lumrec.run.limits import check_names, count

logger = logging.getLogger(__name__)
# Part of a version's identity: answers that were built by another rule are never taken over.
ROWS_SEE = "events before their moment"
# Readers open these until the next version is published, even after overwrite=true.
SERVED = (MANIFEST, "knowledge-*", f"{FRESH}*")


@dataclass(frozen=True)
class QueryConfig:
    """Step 2: what is asked, for whom, and how the answers are stored.

    conditions: raw values by condition feature, such as [{feedback: like}, {feedback: dislike, category: shoes}]; [{}]
        asks without a condition; [] asks each value of each wish of the schema. One entry can mean several conditions:
        "*" means each value of the training events, the most frequent first; "top 3" means the three most frequent
        values in the history, which differ by user and moment ("top 2 of 3" is only the second of them; where a history
        has fewer values, the feature is not given). Several such features are asked in every combination. In a
        multi-valued feature, red|shoes is one condition with two values.
    max_conditions: largest number of conditions; more is an error.
    rows: ask for every row of the log, with the history before its moment (what rankers train on).
    users: ask for every user, after the last event (what serving reads).
    stride: a history longer than model.max_events is read in windows that begin every `stride` events, so that every
        row has at least max_events - stride events before it; 0 = half a window.
    log_normalizer: store log_z, the log of the sum of exp(similarity) over the catalogue, which turns similarities into
        log-probabilities (docs/concepts.md).
    dtype: number format of the stored vectors; int8 has a scale for each vector.
    refresh_from: knowledge run whose answers are kept for users whose history has not changed; "" = this run's current
        version, if it has one.
    tokens_per_pack: tokens and queries of one forward pass. On a CPU, what fits into a core's cache is fastest; on a
        GPU, more is.
    """

    conditions: list[dict[str, str]] = field(default_factory=list)
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


def run(common: Common, settings: QueryConfig) -> dict[str, float | str]:
    """Publishes the knowledge that `settings` asks for in `<runs_dir>/<run>` and returns the contents of result.json.

    They include "test/lum_auc": how well the answers rank the labels without a ranker (evaluation/lum_auc.py).

    Answers that were made from the same data, LUMs and settings are kept, and a killed build is continued. Otherwise
    the next version is built beside the old one, which can be read meanwhile. Raises MissingFileError for a missing
    input (with the command that makes it), UserError for inputs that do not belong together.
    """
    recorded = common.settings(query=settings)
    device = init_distributed(threads=common.threads)
    if settings.refresh_from:
        read_manifest(common.runs / settings.refresh_from)  # raises, if there is none, before data are read
    lums = open_lums(common)
    _hazard(lums)
    check_schema(common, schema_to_read(common), model=lums[0].trained.model, query=settings)
    data = open_or_prepare(common, make=False)
    lums = find_lums(common, data)
    identity = _identity(common, settings, data, lums)
    run_folder = RunFolder.create(common.folder("query"), "query", recorded, quiet=True, keep=SERVED)
    run_id = on_rank_zero(lambda: run_folder.id)
    manifest = on_rank_zero(lambda: _published(run_folder, identity, run_id))
    if manifest and run_folder.finished and run_folder.result().get("version") == manifest["folder"]:
        logger.info("%s is up to date, skipping (overwrite=true makes it again)", run_folder.path)
        result = run_folder.result()
        run_folder.close()
        return result

    start = time.perf_counter()
    if manifest is None:
        manifest = _build(common, settings, data, lums, identity, run_folder, run_id, device)
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
    if settings.rows:
        result |= rank_by_answers(Knowledge.open(run_folder.path, data), data)
    result["wall_s"] = time.perf_counter() - start
    run_folder.finish(result)
    asked = ", ".join(spoken(condition) for condition in manifest["conditions"])
    logger.info(
        "%s: asked %s for %s (%s)", run_folder.path, ", ".join(lum.run for lum in lums), asked, manifest["hazard"]
    )
    return result


def _build(
    common: Common,
    settings: QueryConfig,
    data: PreparedData,
    lums: list[AskedLum],
    identity: dict[str, Any],
    run_folder: RunFolder,
    run_id: str,
    device: torch.device,
) -> dict[str, Any]:
    """Asks the LUMs and publishes the answers; returns the manifest of the version."""
    earlier_path = common.runs / settings.refresh_from if settings.refresh_from else run_folder.path
    own = earlier_path == run_folder.path
    earlier = find_earlier(earlier_path, identity, required=not own, made_by=run_id if own else None)
    with full_disk_told(run_folder.path):
        job = Build(data, identity, run_folder, lums[0].trained.model, earlier, run_id)
        for index, lum in enumerate(lums):
            if pending := job.pending(index):
                dmp, builder, _ = load_lum(lum.trained.folder, data, device=device)
                query = GroupQuery(
                    dmp,
                    builder,
                    identity["conditions"],
                    **identity["window"],
                    tokens_per_pack=identity["tokens_per_pack"],
                    max_conditions=settings.max_conditions,
                )
                job.ask(index, pending, query)
        return job.publish()


def _identity(common: Common, config: QueryConfig, data: PreparedData, lums: list[AskedLum]) -> dict[str, Any]:
    """Everything that determines the answers, JSON-compatible. Raises UserError for settings that cannot work."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) != world_size():
        raise UserError("the query stage runs on one machine (its processes write the same files): use -j 1xN")
    model = lums[0].trained.model
    check_stride(config.stride, model)
    features = condition_features(model, data.schema)
    asked = config.conditions or default_conditions(data, features)
    conditions = expand(data, features, asked, max_conditions=config.max_conditions)
    Conditions(data, features, conditions)  # raises for what cannot be asked, before a LUM is loaded
    forgotten = on_rank_zero(lambda: forgotten_among(common.runs, key_digests(data.user_keys())))
    return {
        "data_fingerprint": data.fingerprint,
        "lums": [{"run": lum.run, "fold": lum.fold, "fingerprint": lum.fingerprint} for lum in lums],
        "hazard": _hazard(lums),
        **_learnt_until(data, lums[0].trained.time_share),
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


def check_inputs(common: Common, *, model: ModelConfig, query: QueryConfig) -> None:
    """Raises UserError where there is no knowledge to refresh from; reads no data."""
    if query.refresh_from:
        read_manifest(common.runs / query.refresh_from)


def check_schema(common: Common, schema: SchemaConfig, *, model: ModelConfig, query: QueryConfig) -> None:
    """Raises UserError for conditions on features that the LUM does not read, and for windows that leave out events."""
    check_stride(query.stride, model)
    read = condition_features(model, schema)
    check_names("query.conditions", [name for each in query.conditions for name in each], read, READ_BY_LUM)


def check_data(common: Common, data: PreparedData, *, model: ModelConfig, query: QueryConfig) -> None:
    """Raises UserError for conditions that the prepared data cannot be asked with."""
    features = condition_features(model, data.schema)
    asked = query.conditions or default_conditions(data, features)
    Conditions(data, features, expand(data, features, asked, max_conditions=query.max_conditions))


def check_stride(stride: int, model: ModelConfig) -> None:
    """Raises UserError for windows that would leave out events."""
    if stride >= model.max_events:
        raise UserError(
            f"query.stride: got {stride}, expected less than the LUM's model.max_events={model.max_events}; 0 is half "
            "of that"
        )


def _hazard(lums: list[AskedLum]) -> str:
    """How the LUMs' training data are separated from the rows that rankers train on (see Knowledge)."""
    if len({lum.trained.time_share for lum in lums}) > 1:
        raise UserError("the LUMs differ in pretrain.time_share; pre-train all folds with the same one")
    if len(lums) > 1:
        return "cross_fit"
    return "time_split" if lums[0].trained.time_share < 1.0 else "in_sample"


def _learnt_until(data: PreparedData, share: float) -> dict[str, int]:
    """Timestamp up to which the LUM was trained; empty if it was trained on all training events."""
    return {"learnt_until": moment_of_share(data.split, data.timestamp, share)} if share < 1.0 else {}


def _published(run_folder: RunFolder, identity: dict[str, Any], run_id: str) -> dict[str, Any] | None:
    """The current manifest, if it has this identity and was made by this run; None where a version has to be built.

    Raises like `check_files` where a finished run is damaged.
    """
    path = run_folder.path
    if not (path / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(path)
        if manifest["made_by"] != run_id:  # after overwrite=true: it is served until it is replaced
            return None
        if version_name(identity_of(manifest)) != version_name(identity):
            logger.info("%s was made from other inputs or settings; the next version is built beside it", path)
            return None
        check_files(path / manifest["folder"], manifest["files"], checksums=False)
    except UserError:
        if run_folder.finished:
            raise
        return None
    remove_others(path, path / manifest["folder"])
    return manifest
