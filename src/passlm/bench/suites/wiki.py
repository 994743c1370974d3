"""Convert Wikipedia markup to plain text. `tasks.py` finds and reads the articles."""

import html
import re
from collections.abc import Callable


def strip_wiki_markup(markup: str) -> str:
    """Return the text of an article as a reader sees it, without tables, pictures and notes."""
    text = _without_tags(html.unescape(markup))
    text = _replace_nested(r"\{\{([^{}]*)\}\}", _template_text, text)
    text = _replace_nested(r"(?s)\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "", text)
    text = re.sub(r"\[(?:https?:|ftp:)?//\S+?(?:\s+([^\]]*))?\]", lambda m: m[1] or "", text)
    text = _replace_nested(r"\[\[([^\[\]]*)\]\]", _link_text, text)
    text = re.sub(r"(?m)^:+''.*\n", "", text)  # hatnotes, such as "For other uses, see ..."
    text = re.sub(r"'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\1", text)
    return _tidy(text)


def _without_tags(text: str) -> str:
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?i)<ref\b[^<>]*/>", "", text)
    hidden = "ref|math|gallery|timeline|score|imagemap|table|div"
    text = re.sub(rf"(?is)<({hidden})\b[^>]*>.*?</\1>", "", text)
    text = re.sub(r"(?i)<br\b[^>]*>", "\n", text)
    return re.sub(r"</?[A-Za-z][^<>]*>", "", text)


def _replace_nested(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace matches until none is left, innermost first, because markup is nested."""
    replaced = 1
    while replaced:
        text, replaced = re.subn(pattern, replace, text)
    return text


_DASHES = ("ndash", "spaced ndash", "snd", "spnd", "en dash")
_SHOW_FIRST = ("nowrap", "nobr", "abbr", "nihongo", "smallcaps", "oldstyledate")
_SHOW_LAST = ("lang", "transl", "unicode", "vr")


def _template_text(match: re.Match[str]) -> str:
    """Return the text that a template adds to a sentence.

    Most templates show a box or a note instead; their text is empty.
    """
    name, *values = (part.strip() for part in match[1].split("|"))
    shown = [value for value in values if not re.match(r"[\w\s-]+=", value)]
    name = name.lower()
    if name in _DASHES:
        return "\N{EN DASH}"
    if not shown:
        return ""
    if name in ("convert", "cvt"):
        return " ".join(shown[:2])
    if name in _SHOW_FIRST or name.startswith("lang-"):
        return shown[0]
    return shown[-1] if name in _SHOW_LAST else ""


def _link_text(match: re.Match[str]) -> str:
    target, *shown = match[1].split("|")
    if re.match(r"(?i)\s*(file|image|category|[a-z]{2,3}(-[a-z]+)?)\s*:\S", target):
        return ""
    return shown[-1] if shown else target.lstrip(":")


def _tidy(text: str) -> str:
    text = html.unescape(text).replace("\xa0", " ")
    empty_parentheses = r"\(([\s,;:/\u2013-]|\bor\b)*\)"  # these held only a pronunciation
    text = re.sub(empty_parentheses, "", text)
    text = re.sub(r"[,;:]+(?=\s*[,;])", "", text)
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"[\s,;:]+\)", ")", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([,.;:])(?=\s)", r"\1", text)
    text = re.sub(r"(?m)^[*#]+ ?", "- ", text)
    text = re.sub(r"(?m)^[:; ]+|[ ]+$|^-\s*$", "", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip()
