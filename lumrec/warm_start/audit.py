"""What a warm start took, parameter by parameter, as text, JSON and Markdown."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lumrec.run.errors import UserError
from lumrec.run.files import write_atomically
from lumrec.run.printable import markdown, printable


@dataclass(frozen=True)
class AuditRow:
    """One parameter: its source, how many rows and columns are taken, new and unused, and what its optimizer gets.

    joined: share of the target's raw ids that the source's vocabulary has; None where rows are not by raw id. zeroed:
    numbers that the target's dtype rounded to 0. checked: rows that were compared with production's.
    """

    target: str
    source: str
    target_size: list[int]
    source_size: list[int]
    dtype: str
    rows_taken: int
    rows_new: int
    rows_unused: int
    new_rows: str
    joined: float | None
    columns_taken: int
    columns_new: int
    columns_unused: int
    new_columns: str
    optimizer: str
    zeroed: int = 0
    checked: int = 0


@dataclass
class Audit:
    """What a warm start took.

    rows: of parameters that have a source. fresh: parameters that stay as initialised. unused: tensors of the source
    that are not taken. states_left: the source's optimizer state that is not taken. others: entries of the source that
    are no tensors, and are never read. applied: the model was filled and passed all checks (false for a dry run).
    checked: number of scores that were compared with production's.
    """

    source: str
    kind: str
    rows: list[AuditRow] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    states_left: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    applied: bool = False
    checked: int = 0

    def text(self) -> str:
        """The audit as a table for the terminal."""
        cells = [list(_HEAD), *(list(map(printable, _cells(row))) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
        lines = [f"warm start from {printable(self.source)} ({self.kind}): {self._state()}"]
        for line in cells:
            aligned = [
                cell.rjust(w) if _HEAD[i] in _NUMBERS else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths))
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join(
            [*lines, *(f"{name}: {', '.join(map(printable, values)) or 'none'}" for name, values in self._lists())]
        )

    def markdown(self) -> str:
        """The audit as Markdown."""
        lines = [f"# Warm start from {_code(self.source)} ({self.kind}): {self._state()}", ""]
        lines += [f"| {' | '.join(_HEAD)} |", f"|{'|'.join('---:' if name in _NUMBERS else '---' for name in _HEAD)}|"]
        lines += [f"| {' | '.join(map(markdown, _cells(row)))} |" for row in self.rows] + [""]
        lines += [f"- {name}: {', '.join(map(_code, values)) or 'none'}" for name, values in self._lists()]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> None:
        """Writes warm_start.json and warm_start.md into `folder`, which is made, each whole or not at all.

        Raises UserError where there is a file in place of the folder.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"the audit cannot be saved in {folder}: that is a file; give a folder") from None
        write_atomically(folder / "warm_start.json", json.dumps(asdict(self), indent=1) + "\n")
        write_atomically(folder / "warm_start.md", self.markdown())

    def _state(self) -> str:
        checked = f", {self.checked:,} scores equal production's" if self.checked else ""
        return f"taken{checked}" if self.applied else "dry run, nothing is changed"

    def _lists(self) -> list[tuple[str, list[str]]]:
        return [
            ("stay as initialised", self.fresh),
            ("of the source, unused", self.unused),
            ("of the source, optimizer state not taken", self.states_left),
            ("of the source, no tensors", self.others),
        ]


class PlanError(UserError):
    """Rules that do not fit; the message lists all problems, `audit` holds what does fit."""

    def __init__(self, message: str, audit: Audit) -> None:
        super().__init__(message)
        self.audit = audit


def refuse(audit: Audit, problems: list[str]) -> None:
    """Raises PlanError where there are problems."""
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(
            f"the model cannot start from {audit.source} by these rules; nothing was changed:{shown}{more}", audit
        )


_HEAD = ("parameter", "source", "shape", "dtype", "taken", "new", "unused", "columns", "optimizer state")
_NUMBERS = ("taken", "new", "unused")


def _code(text: str) -> str:
    """Markdown of a name, as it is."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _cells(row: AuditRow) -> list[str]:
    same = row.source_size == row.target_size
    shape = "×".join(map(str, row.target_size)) or "1"
    columns = [] if not row.columns_new else [f"{row.columns_new} new ({row.new_columns})"]
    columns += [] if not row.columns_unused else [f"{row.columns_unused} unused"]
    taken = f"{row.rows_taken:,}" + ("" if row.joined is None else f" ({row.joined:.1%} of the raw ids)")
    dtype = row.dtype + (f", {row.zeroed:,} rounded to 0" if row.zeroed else "")
    return [
        row.target,
        "same name" if row.source == row.target else row.source,
        shape if same else f"{'×'.join(map(str, row.source_size)) or '1'} → {shape}",
        dtype,
        taken + (f", {row.checked:,} checked" if row.checked else ""),
        f"{row.rows_new:,}" + (f" ({row.new_rows})" if row.rows_new else ""),
        f"{row.rows_unused:,}",
        ", ".join(columns) or "all",
        row.optimizer,
    ]
