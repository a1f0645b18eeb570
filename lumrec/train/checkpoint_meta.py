"""Reads a checkpoint's meta.json, and finds the best checkpoint of a run.

All of it is verified: the file's checksum, the type of every value, and that the run's files agree on the best step.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json, sha256
from lumrec.train.identity import Settings

logger = logging.getLogger(__name__)
FORMAT = 1
_META = {
    "step": int,
    "best_step": int,
    "world_size": int,
    "fingerprint": dict,
    "parameters": dict,
    "state": dict,
    "files": dict,
}
_LARGEST = 2**53
Fingerprint = Mapping[str, str | Settings]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders that hold a COMPLETE marker, oldest first; their contents are not verified here."""
    return sorted(path for path in folder.glob("step-*") if (path / "COMPLETE").exists())


def best_checkpoint(run: str | Path) -> Path:
    """The best checkpoint of a run folder, which its newest checkpoint and its result name.

    Raises MissingFileError where the run has no checkpoint, and UserError where the newest or the best one is
    incomplete or damaged. It never falls back to another one.
    """
    run = Path(run)
    paths = sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    if not any((path / "COMPLETE").is_file() for path in paths):
        raise MissingFileError(f"{run / 'checkpoints'} holds no complete checkpoint: has this run trained already?")
    newest = paths[-1]
    if problem := unusable(newest):
        raise UserError(
            f"the newest checkpoint of {run}, which names the best one, cannot be used: {problem}. "
            f"{_other(paths, newest)}Copy {newest.name} back, or train again with overwrite=true"
        )
    best = step_folder(newest, read_meta(newest)["best_step"])
    finished = run / "result.json"
    stated = read_json(finished).get("best_step") if finished.exists() else None
    if stated is not None and stated != read_meta(newest)["best_step"]:
        raise UserError(
            f"{finished} says that the weights of step {stated} were the best, but the newest checkpoint, {newest}, "
            f"names {best.name}: a checkpoint was removed or replaced. Copy it back, or train again with overwrite=true"
        )
    if problem := unusable(best):
        raise UserError(
            f"{best} holds the best weights of {run}, as {newest.name} says, and cannot be used: {problem}. "
            f"{_other(paths, best)}Copy it back, or train again with overwrite=true"
        )
    return best


def _other(paths: Sequence[Path], without: Path) -> str:
    usable = [path for path in paths if path != without and not unusable(path)]
    return f"{usable[-1].name} is complete, but holds other weights and is not used instead. " if usable else ""


def step_folder(path: Path, step: int) -> Path:
    """The folder of another step's checkpoint beside `path`."""
    return path.with_name(f"step-{step:08d}")


def unusable(path: Path) -> str:
    """What is wrong with a checkpoint by its meta.json, in words; "" where it can be used. Tensors are not read."""
    try:
        meta = read_meta(path)
    except UserError as error:
        return str(error)
    return "" if step_folder(path, meta["step"]) == path else f"{path} holds step {meta['step']}"


def read_meta(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's meta.json, verified against the checksum in COMPLETE.

    Raises MissingFileError for a folder that is no complete checkpoint, UserError for a file that `Checkpointer.save`
    cannot have written.
    """
    complete, file = path / "COMPLETE", path / "meta.json"
    if not complete.is_file():
        raise MissingFileError(f"{path} is not a complete checkpoint (no COMPLETE in it)")
    if not file.is_file():
        raise UserError(f"{file} is missing, though COMPLETE states its checksum")
    try:
        stated, digest = complete.read_text(encoding="utf-8", errors="replace").strip(), sha256(file)
    except OSError as error:
        raise UserError(f"{error.filename or file} cannot be read ({error.strerror or error})") from None
    if digest != stated:
        raise UserError(f"{file} does not have the checksum that COMPLETE states")
    meta = read_json(file)
    if meta.get("format") != FORMAT:
        raise UserError(f"{file}: its format is {meta.get('format')!r:.40}, this lumrec reads format {FORMAT}")
    if missing := sorted(_META.keys() - meta.keys()):
        raise UserError(f"{file} lacks {', '.join(missing)}")
    sharding = meta.setdefault("sharding", {})
    wrong = [name for name, kind in _META.items() if type(meta[name]) is not kind]
    wrong += [
        name for name in ("step", "best_step", "world_size") if name not in wrong and not 0 <= meta[name] < _LARGEST
    ]
    texts = {"fingerprint": meta["fingerprint"], "sharding": sharding, "files": meta["files"]}
    wrong += [
        name for name, value in texts.items() if not (isinstance(value, dict) and all(map(_is_text, value.values())))
    ]
    if not wrong and not all(map(_is_shape, meta["parameters"].values())):
        wrong = ["parameters"]
    if not wrong and not all(re.fullmatch(r"\.?\w[\w.-]*", name, re.ASCII) for name in meta["files"]):
        wrong = ["files"]
    if wrong:
        raise UserError(f"{file} is damaged: unexpected kind of value for {', '.join(dict.fromkeys(wrong))}")
    return meta


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _LARGEST for size in value)


def best_of(path: Path) -> Path | None:
    """The best checkpoint that the one in `path` names; None, with a warning, where its meta.json cannot be read."""
    try:
        return step_folder(path, read_meta(path)["best_step"])
    except UserError as error:
        logger.warning("checkpoint %s cannot be read: %s", path, error)
        return None


def check_fingerprint(path: Path, meta: Mapping[str, Any], expected: Fingerprint, *, here: str = "this run") -> None:
    """Raises UserError, with both values, where a checkpoint was not made with what `here` expects.

    A name that only one side has is not compared: the version that wrote the other side did not record it.
    """
    for name in sorted({*meta["fingerprint"]} & {*expected}):
        stored, value = meta["fingerprint"][name], expected[name]
        advice = "Use the data and settings that it was made with, or start another run"
        if isinstance(value, Settings):
            try:
                differences = value.differences(stored)
            except UserError as error:
                raise UserError(f"{path} is damaged: {name}: {error}") from None
            if differences:
                raise UserError(f"{path} is a checkpoint of another {name} than {here}: {some(differences)}. {advice}")
        elif stored != value:
            raise UserError(
                f"{path} is a checkpoint of another {name}: it was made with {stored!r}, {here} has {value!r}. {advice}"
            )


def some(problems: Sequence[str]) -> str:
    """The first six problems in one line, and how many more there are."""
    return "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
