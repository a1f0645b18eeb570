"""Whether files are as they were."""

import hashlib
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Checksum of every file below a folder."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}
