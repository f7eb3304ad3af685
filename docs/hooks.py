"""Formulas become MathML when the site is built, so that a page fetches no script to show them."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_BLOCK = re.compile(r"\.\. math::\n((?:[ \t]+\S.*\n|[ \t]*\n)+)")
_INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth):`([^`]+)`")


def on_page_content(content: str, **_: Any) -> str:
    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return _FORMULA.sub(mathml, content)


class TorchRoles(griffe.Extension):
    """The docstrings' roles, which help() shows as torch's do, become Markdown for the site."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = _BLOCK.sub(_display, obj.docstring.value + "\n")
        text = _INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text)
        text = _ROLE.sub(lambda match: f"`{match[1]}`", text)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _display(match: re.Match[str]) -> str:
    return f"$$\n{' '.join(match[1].split())}\n$$\n\n"
