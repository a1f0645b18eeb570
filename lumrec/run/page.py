"""HTML pages from the templates in lumrec/templates. Each page is one file that loads nothing else and runs no script.

Text that comes from a log or a run cannot become markup: Jinja2 escapes every value, and what would turn the direction
of text around or hide it is shown as its escape (see printable.py). Only SVG charts, which are drawn here, are passed
as Markup. Should one place be missed, the page's Content-Security-Policy still keeps the browser from running it.
"""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lumrec.run.files import write_atomically
from lumrec.run.printable import printable


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page whole or not at all; returns its path. template: a file of lumrec/templates."""
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
