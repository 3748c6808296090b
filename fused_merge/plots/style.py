"""What all pictures have in common: their style, and how they become files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_merge.io.files import expanded
from fused_merge.io.sources import PathLike
from fused_merge.io.writer import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Perceptually uniform, and the same order of lightness in grey.
COLOR_MAP = "cividis"
# For what stands in the background.
SOFT = "#8b949e"
DPI = 130

# Each is told from the others by its marker and its dashes too; all are dark enough for text on white.
_COLORS = ("#08306b", "#d55e00", "#009e73", "#7b3294", "#000000", "#8c510a")
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "legend.frameon": False,
    # Names are the user's: a $ in them is no formula.
    "text.parse_math": False,
    # Otherwise the ids within an SVG would be random.
    "svg.hashsalt": "fused_merge",
}
# By suffix; what is left out would hold the date, or the version of matplotlib.
_METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def style() -> AbstractContextManager[None]:
    """Draw in the common style, within a `with` block."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def look(i: int) -> dict[str, Any]:
    """Return color, marker and line style of the i-th line of a picture."""
    chosen = (("color", _COLORS), ("marker", _MARKERS), ("linestyle", _DASHES))
    return {key: values[i % len(values)] for key, values in chosen}


def picture_path(path: PathLike) -> Path:
    """Return where a picture will be written; to be called before anything is computed for it.

    Raises:
        ValueError: if the name ends in neither `.png` nor `.svg`.
        ImportError: if matplotlib is missing.
    """
    found = expanded(path)
    if found.suffix.lower() not in _METADATA:
        raise ValueError(f"{path} must end in {' or '.join(_METADATA)}, since that says what is written; rename it")
    check_matplotlib(found.name)
    return found


def check_matplotlib(what: str) -> None:
    """Raise ImportError if matplotlib is missing; the sentence says what needs it and what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'fused_merge[plots]'") from error


def write_picture(figure: Figure, path: Path) -> None:
    """Write a picture in the format of its suffix; the same figure becomes the same bytes."""
    suffix, content = path.suffix.lower(), BytesIO()
    with style():
        figure.savefig(content, format=suffix[1:], metadata=_METADATA[suffix])
    write_whole(path, content.getvalue())
