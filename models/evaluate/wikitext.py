"""WikiText's files: articles, and the text before its tokenization into words.

The raw files separate punctuation by spaces and write ``@-@`` for a hyphen inside a word. lm-evaluation-harness scores
the text with that undone, and divides by the words of the file as it is. The rules below are the harness's, in its
order and with its oddities: a different text would give another number.
"""

import re

# (what is found, what takes its place)
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("s '", "s'"),
        # Meant for years such as '90, but the slashes are taken literally: it matches next to nothing.
        ("/' [0-9]/", "/'[0-9]/"),
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (r" @\.@ ", "."),
        # One after the other, since two marks in a row share the space between them.
        *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u00b0 ", "\u00b0"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    )
]


def detokenize(text: str) -> str:
    """``text`` as running text."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def split_articles(text: str) -> list[str]:
    """The articles of a WikiText file, each from its title ``= Title =`` to the line before the next.

    What stands before the first title is an article of its own, unless it is blank.
    """
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_title(line) and "\n".join(articles[-1]).strip():
            articles.append([])
        elif _is_title(line):
            articles[-1] = []
        articles[-1].append(line)
    return ["\n".join(lines) for lines in articles]


def _is_title(line: str) -> bool:
    """Whether ``line`` is a heading of the first level; those below have ``= =`` and more on either side."""
    collapsed = line.replace("= = =", "===").replace("= =", "==").strip()
    return collapsed.startswith("= ") and collapsed.endswith(" =")
