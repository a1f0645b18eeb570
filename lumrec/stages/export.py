"""A trained ranker, LUM or two towers as a bundle: all that it is served from, in one folder, published whole."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lumrec.batches.packs import PackBuilder
from lumrec.batches.rows import RowBuilder
from lumrec.data.common import Common
from lumrec.data.prepare import open_prepared
from lumrec.data.prepared import PreparedData
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.metrics.bootstrap import compare
from lumrec.metrics.compare import read_scores
from lumrec.metrics.ranking import sigmoid
from lumrec.models.lum import TrainedLum, build_lum, check_lum_fits, open_lum_run
from lumrec.models.ranker import TrainedRanker, open_ranker_run, plain_ranker
from lumrec.models.towers import TrainedTowers, open_towers_run, plain_towers
from lumrec.modules.rankers.base import Ranker
from lumrec.query.group_query import GroupQuery
from lumrec.run.distributed import init_distributed, world_size
from lumrec.run.errors import UserError
from lumrec.run.files import full_disk_told, read_json, write_atomically
from lumrec.run.folder import RunFolder, stage_of
from lumrec.run.limits import count
from lumrec.serving import bundle as bundles
from lumrec.serving.card import model_card
from lumrec.serving.golden import check_golden, golden_rows, write_golden
from lumrec.serving.graph import export_graph
from lumrec.serving.keys import write_keys
from lumrec.serving.lum_graph import ExportedLum, export_lum
from lumrec.serving.requests import RequestSpec
from lumrec.serving.scorer import identity_of_lums
from lumrec.serving.tables import write_tables
from lumrec.serving.tower_graph import Towers, export_towers
from lumrec.train.checkpoint import load_weights

logger = logging.getLogger(__name__)
# What readers open until the next version is published, after overwrite=true too.
SERVED = (bundles.MANIFEST, "bundle-*")
TEST_BATCH = 128  # rows that export.test_rows scores at a time
KINDS: dict[type, bundles.Kind] = {TrainedRanker: "ranker", TrainedLum: "LUM", TrainedTowers: "towers"}
TOLERANCES = {"float32": 1e-6, "float16": 2e-3, "int8": 2e-2}  # of a probability, by the dtype of the tables


@dataclass(frozen=True)
class ExportConfig:
    """How a trained model becomes a bundle. It is the run `run` of a ranker, a LUM or two towers ("" = the ranker
    "<name>-rank"), and the bundle is beside it, in "<run>-bundle".

    dtype: number format of the embedding tables; int8 has a scale for each row. float16 and int8 take a half and a
        quarter of the memory, and move scores a little (a ranker's model card says how much).
    compile: "none" writes the graph as operators of torch; "aoti" compiles it for this kind of machine by AOTInductor
        (rankers only; needs a C++ compiler). A compiled bundle is machine code: readers have to say that they trust it.
    test_rows: test rows that a ranker's bundle scores too; result.json and the model card then say how much its metrics
        differ from the ranker's, with 95 % intervals over users. 0: none.
    """

    dtype: Literal["float32", "float16", "int8"] = "float32"
    compile: Literal["none", "aoti"] = "none"
    test_rows: int = count(0)


def check_inputs(common: Common, *, export: ExportConfig) -> None:
    """Raises as `_open_run`, and MissingFileError where the ranker has no scores of test rows to compare."""
    trained = _open_run(common, export)
    if export.test_rows:
        read_scores(trained.folder)


def _open_run(common: Common, settings: ExportConfig) -> TrainedRanker | TrainedLum | TrainedTowers:
    """What is to be exported. Raises MissingFileError where it is not finished, UserError where it cannot be."""
    folder = common.folder("rank")
    stage = stage_of(folder)
    if stage in ("pretrain", "retrieve"):
        for name in ("compile", "test_rows"):
            if getattr(settings, name) != getattr(ExportConfig(), name):
                raise UserError(f"export.{name} is for rankers, and {folder} is a run of {stage}: leave it out")
        return open_lum_run(folder) if stage == "pretrain" else open_towers_run(folder)
    trained = open_ranker_run(folder)
    if trained.common.data.source == "served":
        raise UserError(
            f"{trained.folder} was trained on what was served (data.source=served): its data hold no log, of which "
            "lumrec export makes the golden rows and the history of the items, so it cannot be exported"
        )
    return trained


def run(common: Common, settings: ExportConfig) -> dict[str, float | str]:
    """Publishes the bundle of the model in `run` beside its folder and returns what its result.json holds.

    Keys: version, sha256 (of the manifest, to be compared by whoever opens the bundle elsewhere), bytes,
    golden_difference (the largest one of a score to that of the trained ranker; of LUMs and towers, of a vector, as a
    share of the largest number), golden_rows of a ranker and, with export.test_rows, those of `_tested`, wall_s, and as
    text model, bundle.
    A finished bundle of the same model and settings is kept; else the next version is built beside the old one, which
    can be read meanwhile. Raises MissingFileError for a missing input, UserError for a model that does not come out.
    """
    started = time.perf_counter()
    init_distributed("cpu", threads=common.threads)
    if world_size() > 1:
        raise UserError("the export stage runs in one process: use -j 1x1")
    trained = _open_run(common, settings)
    path, kind = bundles.folder_of(trained.folder), KINDS[type(trained)]
    inputs = {
        kind: str(read_json(trained.folder / "versions.json").get("id", "")),
        "checkpoint": trained.checkpoint.name,
    }
    recorded = common.settings(export=settings)
    run_folder = RunFolder.create(path, "export", recorded, inputs=inputs, keep=SERVED)
    if run_folder.finished:
        bundles.read_manifest(path, kind)
        return run_folder.result()
    with (
        full_disk_told(path, "the bundle", then="make room and run the same command again"),
        bundles.new_version(path) as folder,
    ):
        if isinstance(trained, TrainedLum):
            content, figures = _write_lum(trained, settings, folder)
        elif isinstance(trained, TrainedTowers):
            content, figures = _write_towers(trained, settings, folder)
        else:
            content, figures = _write_ranker(trained, settings, folder)
        manifest = bundles.publish(path, folder, content | {"made_by": run_folder.id, "built_at": int(time.time())})
        logger.info("%s: published %s, SHA-256 %s", path, folder.name, manifest["sha256"])
    result: dict[str, float | str] = {
        "model": trained.config.model if isinstance(trained, TrainedRanker) else kind,
        "bundle": str(path),
        "version": manifest["folder"],
        "sha256": manifest["sha256"],
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        **figures,
        "wall_s": time.perf_counter() - started,
    }
    run_folder.finish(result)
    return result


def _write_ranker(
    trained: TrainedRanker, settings: ExportConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes all files of a version and checks that it gives the ranker's scores.

    Returns what its manifest holds, and the figures of result.json.
    """
    ranker, rows = plain_ranker(trained)
    spec = _write_inputs(folder, trained, ranker, rows)
    write_tables(folder / bundles.TABLES, ranker.tables, dtype=settings.dtype)
    export_graph(ranker, folder / bundles.GRAPH, dtype=settings.dtype, compile=settings.compile)
    content: dict[str, Any] = {
        "ranker": {"run": trained.folder.name, "model": trained.config.model, "config": asdict(trained.config)},
        "spec": spec.to_json(),
        "needs": _needs(rows),
        "dtype": settings.dtype,
        "compile": settings.compile,
        "tolerance": TOLERANCES[settings.dtype],
        **_facts(rows.data),
    }
    opened = bundles.open_parts(folder, content)
    golden = golden_rows(rows.data)
    write_golden(folder, golden, ranker, rows, opened.builder)
    figures = {"golden_rows": len(golden), "golden_difference": check_golden(opened)}
    content |= figures
    tested = _tested(opened, rows, trained.folder, settings.test_rows) if settings.test_rows else {}
    result = read_json(trained.folder / "result.json")
    name, config = trained.folder.name, trained.config
    card = model_card(ranker=name, config=config, data=rows.data, result=result, manifest=content, tested=tested)
    write_atomically(folder / bundles.CARD, card)
    return content, figures | tested


def _write_lum(trained: TrainedLum, settings: ExportConfig, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """As `_write_ranker`, for a LUM (lum_graph.py), with the keys of its tables."""
    data = open_prepared(trained.prepared)
    lum, builder = build_lum(trained.model, data)
    check_lum_fits(trained, data)
    load_weights(trained.checkpoint, lum)
    query = GroupQuery(lum.eval(), builder, _golden_conditions(builder), max_events=trained.model.max_events)
    spec = export_lum(query, folder, dtype=settings.dtype)
    run = {"run": trained.folder.name, "checkpoint": trained.fingerprint, "config": asdict(trained.model)}
    content = {"kind": "LUM", "LUM": run, "spec": asdict(spec), **_write_names(folder, data)}
    return content, {"golden_difference": ExportedLum(folder).golden_difference}


def _golden_conditions(builder: PackBuilder) -> list[dict[str, str]]:
    """No condition, and each condition feature with one of its values."""
    conditions: list[dict[str, str]] = [{}]
    for name in builder.condition_features:
        values = builder.data.vocabulary(builder.data.schema.features[name].table)
        conditions += [{name: value} for value in values if "|" not in value][:1]
    return conditions


def _write_towers(
    trained: TrainedTowers, settings: ExportConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """As `_write_ranker`, for two towers (tower_graph.py), with the keys of their tables."""
    towers, builder = plain_towers(trained)
    spec = export_towers(towers, builder, folder, dtype=settings.dtype)
    run = {"run": trained.folder.name, "config": asdict(trained.config)}
    content = {"kind": "towers", "towers": run, "spec": asdict(spec), "needs": _needs(builder)}
    content |= _write_names(folder, builder.data)
    return content, {"golden_difference": Towers(folder).golden_difference}


def _write_names(folder: Path, data: PreparedData) -> dict[str, Any]:
    """Writes the keys of all tables and items, and the items' titles; returns `_facts`."""
    (folder / bundles.ITEMS).mkdir(exist_ok=True)
    bundles.write_titles(folder, data)
    write_keys(folder, {table: data.vocabulary(table) for table in data.table_rows}, data.item_keys())
    return _facts(data)


def _facts(data: PreparedData) -> dict[str, Any]:
    """What a manifest says of the data."""
    return {
        "data": {
            "dataset": data.manifest["dataset"],
            "fingerprint": data.fingerprint,
            "vocabulary_fingerprint": data.vocabulary_fingerprint,
        },
        "table_rows": data.table_rows,
        "num_items": data.num_items,
        "torch": torch.__version__,
    }


def _write_inputs(folder: Path, trained: TrainedRanker, ranker: Ranker, rows: RowBuilder) -> RequestSpec:
    """Writes keys and items; what requests are made of."""
    data: PreparedData = rows.data
    assert rows.statistics is not None and rows.statistics.model is not None
    (folder / bundles.ITEMS).mkdir()
    Catalogue.of(data).save(folder / bundles.ITEMS)
    if trained.config.statistics == "all":
        ItemHistory.of(data).save(folder / bundles.ITEMS)
    _write_names(folder, data)
    return RequestSpec.of(
        data,
        rows.statistics.model,
        features=ranker.features,
        row_features=ranker.row_features,
        max_history=trained.config.max_history,
        reads=ranker.reads,
        category=trained.config.category,
    )


def _tested(bundle: bundles.Bundle, rows: RowBuilder, ranker: Path, num_rows: int) -> dict[str, float]:
    """How scores of the bundle differ from those that the run of the ranker kept, over `num_rows` of the test rows.

    Keys: test_rows, test_difference (the largest one of a probability) and, for each metric (auc, gauc, log_loss),
    <metric> (the bundle's), <metric>_change (minus the ranker's) and the change's interval in …_low, …_high.
    """
    kept = read_scores(ranker)
    drawn = np.sort(np.random.default_rng(0).permutation(len(kept.row_N))[:num_rows])
    kept = type(kept)(*(values_N[drawn] for values_N in kept))
    parts = [kept.row_N[first : first + TEST_BATCH] for first in range(0, len(drawn), TEST_BATCH)]
    score_N = np.concatenate([bundle.graph(rows.batch(part)).numpy() for part in parts]).astype(np.float64)
    result = {"test_rows": len(drawn), "test_difference": float(np.abs(score_N - sigmoid(kept.logit_N)).max())}
    safe_N = score_N.clip(1e-7, 1 - 1e-7)  # a float32 probability may be 1
    for name, found in compare(kept.label_N, kept.logit_N, np.log(safe_N / (1 - safe_N)), kept.user_N).items():
        change = {f"{name}_change{of}": x for of, x in zip(("", "_low", "_high"), found.difference, strict=True)}
        result |= {name: found.b.value, **change}
    return result


def _needs(rows: RowBuilder) -> dict[str, Any] | None:
    """The knowledge that the ranker reads, as `Scorer.check_store` compares it."""
    if rows.knowledge is None:
        return None
    manifest = rows.knowledge.manifest
    lums = identity_of_lums(manifest["lums"])
    return {"lums": lums, **{name: manifest[name] for name in ("conditions", "dim", "log_normalizer")}}
