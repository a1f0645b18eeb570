"""A trained ranker as a scorer bundle: everything that scoring needs, in one folder that is published whole."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lumrec.batches.rows import RowBuilder
from lumrec.data.common import Common
from lumrec.data.prepared import PreparedData
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.metrics.bootstrap import compare
from lumrec.metrics.compare import read_scores
from lumrec.metrics.ranking import sigmoid
from lumrec.models.ranker import TrainedRanker, open_ranker_run, plain_ranker
from lumrec.modules.rankers.base import Ranker
from lumrec.run.distributed import init_distributed, world_size
from lumrec.run.errors import UserError
from lumrec.run.files import full_disk_told, read_json, write_atomically
from lumrec.run.folder import RunFolder
from lumrec.run.limits import count
from lumrec.serving import bundle as bundles
from lumrec.serving.card import model_card
from lumrec.serving.golden import check_golden, golden_rows, write_golden
from lumrec.serving.graph import export_graph
from lumrec.serving.keys import write_keys
from lumrec.serving.requests import RequestSpec
from lumrec.serving.scorer import identity_of_lums
from lumrec.serving.tables import write_tables

logger = logging.getLogger(__name__)
# What readers open until the next version is published, after overwrite=true too.
SERVED = (bundles.MANIFEST, "bundle-*")
TEST_BATCH = 128  # rows that export.test_rows scores at a time
TOLERANCES = {"float32": 1e-6, "float16": 2e-3, "int8": 2e-2}  # of a probability, by the dtype of the tables


@dataclass(frozen=True)
class ExportConfig:
    """How a ranker becomes a bundle. The ranker is the run `run` ("" = "<name>-rank"), and the bundle is beside it, in
    "<run>-bundle".

    dtype: number format of the embedding tables; int8 has a scale for each row. float16 and int8 take a half and a
        quarter of the memory, and move scores a little (the model card says how much).
    compile: "none" writes the graph as operators of torch; "aoti" compiles it for this kind of machine by AOTInductor
        (needs a C++ compiler). A compiled bundle is machine code: readers have to say that they trust it.
    test_rows: test rows that the bundle scores too; result.json and the model card then say how much its metrics
        differ from the ranker's, with 95 % intervals over users. 0: none.
    """

    dtype: Literal["float32", "float16", "int8"] = "float32"
    compile: Literal["none", "aoti"] = "none"
    test_rows: int = count(0)


def check_inputs(common: Common, *, export: ExportConfig) -> None:
    """Raises as `_open_ranker`, and MissingFileError where the ranker has no scores of test rows to compare."""
    trained = _open_ranker(common)
    if export.test_rows:
        read_scores(trained.folder)


def _open_ranker(common: Common) -> TrainedRanker:
    """The ranker to export. Raises MissingFileError where it is not finished, UserError where it cannot be exported."""
    trained = open_ranker_run(common.folder("rank"))
    if trained.common.data.source == "served":
        raise UserError(
            f"{trained.folder} was trained on what was served (data.source=served): its data hold no log, of which "
            "lumrec export makes the golden rows and the history of the items, so it cannot be exported"
        )
    return trained


def run(common: Common, settings: ExportConfig) -> dict[str, float | str]:
    """Publishes the bundle of the ranker `run` beside its folder and returns what its result.json holds.

    Keys: version, sha256 (of the manifest, to be compared by whoever opens the bundle elsewhere), bytes, golden_rows,
    golden_difference (the largest one of a score to that of the trained ranker), those of `_tested` with
    export.test_rows, wall_s, and as text model, bundle.
    A finished bundle of the same ranker and settings is kept; else the next version is built beside the old one, which
    can be read meanwhile. Raises MissingFileError for a missing input, UserError for a ranker that does not come out.
    """
    started = time.perf_counter()
    init_distributed("cpu", threads=common.threads)
    if world_size() > 1:
        raise UserError("the export stage runs in one process: use -j 1x1")
    trained = _open_ranker(common)
    path = bundles.folder_of(trained.folder)
    inputs = {
        "ranker": str(read_json(trained.folder / "versions.json").get("id", "")),
        "checkpoint": trained.checkpoint.name,
    }
    recorded = common.settings(export=settings)
    run_folder = RunFolder.create(path, "export", recorded, inputs=inputs, keep=SERVED)
    if run_folder.finished:
        bundles.read_manifest(path)
        return run_folder.result()
    with (
        full_disk_told(path, "the bundle", then="make room and run the same command again"),
        bundles.new_version(path) as folder,
    ):
        manifest, tested = _build(trained, settings, folder, run_folder)
    result: dict[str, float | str] = {
        "model": trained.config.model,
        "bundle": str(path),
        "version": manifest["folder"],
        "sha256": manifest["sha256"],
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "golden_rows": manifest["golden_rows"],
        "golden_difference": manifest["golden_difference"],
        **tested,
        "wall_s": time.perf_counter() - started,
    }
    run_folder.finish(result)
    return result


def _build(
    trained: TrainedRanker, settings: ExportConfig, folder: Path, run_folder: RunFolder
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes all files of a version, checks that it gives the ranker's scores, and publishes it.

    Returns its manifest, and what `_tested` found (nothing without export.test_rows).
    """
    ranker, rows = plain_ranker(trained)
    spec = _write_inputs(folder, trained, ranker, rows)
    write_tables(folder / bundles.TABLES, ranker.tables, dtype=settings.dtype)
    export_graph(ranker, folder / bundles.GRAPH, dtype=settings.dtype, compile=settings.compile)
    content: dict[str, Any] = {
        "ranker": {"run": trained.folder.name, "model": trained.config.model, "config": asdict(trained.config)},
        "data": {
            "dataset": rows.data.manifest["dataset"],
            "fingerprint": rows.data.fingerprint,
            "vocabulary_fingerprint": rows.data.vocabulary_fingerprint,
        },
        "spec": spec.to_json(),
        "needs": _needs(rows),
        "table_rows": rows.data.table_rows,
        "num_items": rows.data.num_items,
        "dtype": settings.dtype,
        "compile": settings.compile,
        "tolerance": TOLERANCES[settings.dtype],
        "torch": torch.__version__,
        "made_by": run_folder.id,
        "built_at": int(time.time()),
    }
    opened = bundles.open_parts(folder, content)
    golden = golden_rows(rows.data)
    write_golden(folder, golden, ranker, rows, opened.builder)
    content |= {"golden_rows": len(golden), "golden_difference": check_golden(opened)}
    tested = _tested(opened, rows, trained.folder, settings.test_rows) if settings.test_rows else {}
    result = read_json(trained.folder / "result.json")
    name, config = trained.folder.name, trained.config
    card = model_card(ranker=name, config=config, data=rows.data, result=result, manifest=content, tested=tested)
    write_atomically(folder / bundles.CARD, card)
    manifest = bundles.publish(run_folder.path, folder, content)
    logger.info("%s: published %s, SHA-256 %s", run_folder.path, folder.name, manifest["sha256"])
    return manifest, tested


def _write_inputs(folder: Path, trained: TrainedRanker, ranker: Ranker, rows: RowBuilder) -> RequestSpec:
    """Writes keys and items; what requests are made of."""
    data: PreparedData = rows.data
    assert rows.statistics is not None and rows.statistics.model is not None
    (folder / bundles.ITEMS).mkdir()
    Catalogue.of(data).save(folder / bundles.ITEMS)
    if trained.config.statistics == "all":
        ItemHistory.of(data).save(folder / bundles.ITEMS)
    bundles.write_titles(folder, data)
    write_keys(folder, {table: data.vocabulary(table) for table in data.table_rows}, data.item_keys())
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
