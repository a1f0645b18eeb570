"""The LUM runs that a stage asks: one LUM of all users, or one LUM for each held-out fold of users."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import NamedTuple

from lumrec.data.common import Common
from lumrec.data.prepared import PreparedData
from lumrec.models.lum import TrainedLum, check_lum_fits, open_lum_run
from lumrec.run.errors import UserError

logger = logging.getLogger(__name__)


class AskedLum(NamedTuple):
    """A finished LUM run: its name, the fold "k/K" that was held out from it ("" = none), and its TrainedLum."""

    run: str
    fold: str
    fingerprint: str
    trained: TrainedLum


def find_lums(common: Common, data: PreparedData) -> list[AskedLum]:
    """The LUM runs of `inputs.lums`: LUM k is the one from which fold k was held out; or a single LUM of all users.

    Raises MissingFileError where a run is missing, UserError where the runs are not the K folds of K, were trained on
    other data than `data`, or differ in their model settings.
    """
    lums = open_lums(common)
    for lum in lums:
        if not check_lum_fits(lum.trained, data):
            logger.info("the LUM %s was trained on another state of this log, with the same vocabularies", lum.run)
    return lums


def open_lums(common: Common) -> list[AskedLum]:
    """As `find_lums`, before there are data to compare with; no weights are read."""
    names = common.lums
    lums = [_open_lum(common.runs / name, name) for name in names]
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


def _open_lum(folder: Path, name: str) -> AskedLum:
    fold = f" fold={name.rpartition('-')[2].replace('of', '/')}" if name.rpartition("-")[2].count("of") == 1 else ""
    lum = open_lum_run(
        folder,
        missing=f"there is no finished LUM in {folder}; make it with: torchx run apps/pretrain.py "
        f"--config <your config> {shlex.quote(f'run={name}')}{fold}",
    )
    return AskedLum(name, lum.common.fold, lum.fingerprint, lum)
