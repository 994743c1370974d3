"""Builds elements and tables that are valid both as HTML and as XML; escapes text in them.

Numbers are shown rounded; `<data value>` keeps all their digits.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

NONE = "\N{EN DASH}"  # content of a cell without a value
_EMPTY = frozenset(("meta",))  # void elements: HTML allows no end tag
_NO_TEXT = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Row = Sequence[str]


class Markup(str):
    """Text that is already markup; any other text is escaped when it is put into an element."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """Return an element with its content.

    Args:
        name: name of the tag.
        content: content of the element; escaped unless it is `Markup`.
        attributes: attributes by name; None leaves one out. A trailing `_` is dropped from a name
            (`class_`), and other `_` become `-`.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Markup(f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{joined(content)}</{name}>")


def joined(parts: Sequence[str]) -> Markup:
    """Join parts; those that are not `Markup` are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else _escape(part) for part in parts))


def _escape(text: str) -> str:
    """Escape text for content and attributes.

    Characters that XML does not allow become the replacement character.
    """
    return html.escape(_NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text))


def _attribute(value: str | float) -> str:
    return _escape(value) if isinstance(value, str) else f"{round(value, 1):g}"


def finite(value: Any) -> float | None:
    """Return the value as a float if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def interval_ends(value: Any) -> tuple[float, float] | None:
    """Return the two ends of an interval, or None if either is not a finite number."""
    low, high = map(finite, value) if value is not None and len(value) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def rounded(value: float, digits: int = 2) -> str:
    """Format a number with `digits` decimals, or three significant digits if tiny or huge."""
    usual = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{value:.{digits}f}" if usual else f"{value:.3g}"


def number_cell(value: Any, digits: int = 2) -> str:
    """Return the content of a cell with a number."""
    plain = finite(value)
    return NONE if plain is None else element("data", rounded(plain, digits), value=repr(value))


def count_cell(value: Any) -> str:
    """Return the content of a cell with a whole number."""
    return number_cell(value, 0)


def share_cell(value: Any) -> str:
    """Return the content of a cell with a share, shown in percent."""
    plain = finite(value)
    return NONE if plain is None else element("data", f"{100 * plain:.1f} %", value=repr(value))


def shares_cell(values: Any) -> str:
    """Return the content of a cell with several shares."""
    cells = [part for value in values or () for part in (", ", share_cell(value))]
    return joined(cells[1:]) if cells else NONE


def span_cell(value: Any) -> str:
    """Return the content of a cell with an interval."""
    interval = interval_ends(value)
    return (
        NONE if interval is None else joined([number_cell(value[0]), " to ", number_cell(value[1])])
    )


def table(head: Row, rows: Sequence[Row], what: str) -> Markup:
    """Return a table that scrolls horizontally on narrow pages; first cells are row headers."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = []
    for row in rows:
        cells = [element("td", cell) for cell in row[1:]]
        body.append(element("tr", element("th", row[0], scope="row"), *cells))
    drawn = element("table", element("thead", top), element("tbody", *body))
    return element("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=what)


def folded_table(head: Row, rows: Sequence[Row], what: str) -> Markup:
    """Return a table that is collapsed on screen and shown in print; for the numbers of a chart."""
    return element("details", element("summary", f"Numbers: {what}"), table(head, rows, what))


def paragraph(*parts: str) -> Markup:
    """Return a paragraph."""
    return element("p", *parts)


def section(name: str, title: str, *content: Markup, class_: str | None = None) -> Markup:
    """Return a section of the page with its heading."""
    return element("section", element("h2", title), *content, id=name, class_=class_)
