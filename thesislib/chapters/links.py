"""A finished page's prose: Figure 3.2 links to the figure, `depth.metric` and `depth: {metric: taylor}` to the setting,
and no line breaks within an interval or between a number and its sign."""

import re
from collections.abc import Callable
from dataclasses import fields

from thesislib.compress.stage import STAGES
from thesislib.errors import unknown

PIECES = re.compile(
    r"<(?P<other>a|pre|script|style|svg|h\d)\b.*?</(?P=other)>|<code[^>]*>(?P<code>.*?)</code>|<[^>]*>"
    r"|(?P<figure>\b[Ff]igure (?P<number>\d+\.\d+))"
    r"|(?P<whole>\[[-+]?[\d.,]+ ?%?, [-+]?[\d.,]+ ?%?\]|\bx [\d.,]+|\d %)",
    re.DOTALL,
)
NAMED = re.compile(r"(?P<word>\w+)\.(?P<field>\w+)")  # as prose names a setting
GIVEN = re.compile(r"(?:- )?(?P<word>\w+): \{.*\}")  # as a recipe gives settings


def linked(page: str, address: Callable[[str], str]) -> str:
    """A page's HTML with links at the figures and settings that it names, and intervals, ratios and percentages whole.

    Links, titles, blocks of code and pictures stay as they are.

    Args:
        page: the HTML.
        address: of a figure such as "fig-3-2", or of a setting such as "thesislib.compress.depth.Depth.metric".

    Raises:
        BadInput: a stage has no such setting.
    """

    def piece(found: re.Match) -> str:
        if found["figure"]:
            return f'<a href="{address("fig-" + found["number"].replace(".", "-"))}">{found["figure"]}</a>'
        if found["whole"]:
            return found["whole"].replace(" ", "&nbsp;")
        text = re.sub(r"<[^>]*>", "", found["code"] or "")
        named, given = NAMED.fullmatch(text), GIVEN.fullmatch(text)
        word = (named or given or {"word": ""})["word"]
        if word not in STAGES:
            return found[0]
        if named:
            text = f'<a href="{address(setting(word, named["field"]))}">{text}</a>'
        else:
            start = text.index("{")
            keys = re.sub(
                r"\w+(?=: )", lambda key: f'<a href="{address(setting(word, key[0]))}">{key[0]}</a>', text[start:]
            )
            text = text[:start] + keys
        return f'<code class="docutils literal notranslate">{text}</code>'

    return PIECES.sub(piece, page)


def setting(word: str, field: str) -> str:
    """The full name of a stage's setting, at the class that describes it.

    Args:
        word: the stage's, in recipes.
        field: the setting's.

    Raises:
        BadInput: the stage has no such setting.
    """
    stage = STAGES[word]
    names = [f.name for f in fields(stage)]
    if field not in names:
        raise unknown(f"setting of {word}", field, names)
    owner = next(cls for cls in stage.__mro__ if re.search(rf"^ +{field}: ", cls.__doc__ or "", re.MULTILINE))
    return f"{owner.__module__}.{owner.__qualname__}.{field}"
