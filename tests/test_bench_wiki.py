"""Markup becomes the text that a reader of the article sees."""

import pytest

from passlm.bench.suites.wiki import strip_wiki_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("a [[link]], a [[page|named link]]", "a link, a named link"),
        ("[[:Category:Things]]", "Category:Things"),
        ("[[File:a.jpg|thumb|A [[link]] and {{cite|x}} [http://a.b c]]]Text", "Text"),
        ("Text[[Category:Things]][[de:Ding]]", "Text"),
        ("[http://a.b the site] and [http://a.b]", "the site and"),
        ('Fact.<ref name="a/b" /> More.<ref>{{cite|title=x}}</ref>', "Fact. More."),
        ("A<!-- hidden\nlines -->B", "AB"),
        ("{{Infobox|a={{b|c}}\n|d=e}}Text", "Text"),
        ("{|class=x\n|-\n|cell {|inner|}\n|}\nText", "Text"),
        ("about {{convert|12|km|mi|abbr=on}} long", "about 12 km long"),
        ("from {{lang|fr|mot}}, {{nowrap|two words}}", "from mot, two words"),
        ("{{nihongo|'''Aikido'''|合気道|aikidō}} is", "Aikido is"),
        ("(1775{{ndash}}1783)", "(1775\N{EN DASH}1783)"),
        ("Name ({{IPAc-en|x}}; {{lang-el|λόγος}}) is", "Name (λόγος) is"),
        ("Name ({{IPAc-en|x}}, or {{IPA|y}}) is", "Name is"),
        (":''For others, see [[Other]].''\nText", "Text"),
        ("== Head ==\nText", "Head\nText"),
        ("* one\n** two\n*\n# three", "- one\n- two\n\n- three"),
        ("H<sub>2</sub>O<br/>next", "H2O\nnext"),
        ("a&nbsp;b &amp; c", "a b & c"),
        ("<math>\\frac{a}{b}</math>x", "x"),
        ("__NOTOC__Text", "Text"),
        ("one\n\n\n\ntwo", "one\n\ntwo"),
        ("{{unclosed text", "{{unclosed text"),
        ("x < y and y > z", "x < y and y > z"),
    ],
)
def test_wiki_markup_becomes_text(markup: str, text: str) -> None:
    """Catches markup in a prompt: the model would be measured on continuing wikitext."""
    assert strip_wiki_markup(markup) == text
