"""HTML pages from the templates in lumrec/templates. Each page is a single file without scripts or external resources.

Text from a log or a run cannot become markup: Jinja2 escapes every value, and characters that would hide text or
reverse its direction are shown as escapes (see printable.py). Only our SVG charts are passed as Markup. As a second
barrier, the page's Content-Security-Policy prevents the browser from running scripts.
"""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lumrec.run.files import write_atomically
from lumrec.run.printable import printable


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page atomically; returns its path. template: a file of lumrec/templates."""
    write_atomically(path, render(template, **values))
    return path


def render(template: str, **values: Any) -> str:
    """The HTML of a page."""
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("lumrec"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(value, lines=True)
