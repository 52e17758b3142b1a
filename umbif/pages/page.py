"""One self-contained HTML page: styles, pictures and figures inside, nothing loaded from anywhere."""

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from umbif.errors import Problem, UsageError
from umbif.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = '<meta name="generator" content="UMBIF">'
FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def render(template: str, **context: Any) -> str:
    """Fills a template of `umbif/pages/templates`; a value it lacks is an error, never a blank."""
    return _environment().get_template(template).render(**context, generator=Markup(GENERATOR), fonts=Markup(FONTS))


def svg(figure: "Figure", label: str) -> Markup:
    """A matplotlib figure as inline SVG that scales with the page and is read aloud as `label`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "umbif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1 and its like would occur once per figure of the page
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"(?:'[^']*', )*sans-serif", FONTS.replace('"', "'"), text)
    attributes = Markup('role="img" aria-label="{}"').format(label)
    return Markup(re.sub(r'<svg ([^>]*?)(?:width|height)="[\d.]+pt"', rf"<svg {attributes} \1", text, count=1))


def data_uri(path: Path) -> str:
    """A picture file as a `data:` address.

    Raises:
        UsageError: It is not there, or not PNG, JPEG or SVG.
    """
    kind = MEDIA_TYPES.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise UsageError(Problem("Not a picture that a page can hold", str(path), "PNG, JPEG and SVG files are."))
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_page(path: Path, html: str) -> Path:
    """Writes the page in one step: readers see the old page or the new one, never half of it.

    Raises:
        UsageError: A file is there that UMBIF did not write.
    """
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(Problem("Will not replace a file that UMBIF did not write", str(path), "Choose another name."))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("umbif.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
