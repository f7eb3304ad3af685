"""What the site needs when it is built: README's pictures, formulas as MathML, docstrings' roles,
pictures that open in full, and printed sentences that wrap.

MathML, so that a page fetches no script to show its formulas.
"""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

import sc_bce

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>([.,:;)]*)', re.DOTALL
)
_BLOCK = re.compile(r"\.\. math::\n((?:[ \t]+\S.*\n|[ \t]*\n)+)")
_INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth):`([^`]+)`")
_PICTURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
_PRINTED = re.compile(
    r'(?<=<div class="language-text highlight"><pre><span></span><code>).*?(?=</code>)', re.DOTALL
)
_SENTENCE = re.compile(r"^(?! )(?!.*  ).* .*$", re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    content = content.replace('src="docs/', 'src="')  # README's, which Home shows
    # On a phone a picture is small: a touch opens it alone.
    content = _PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', content)
    # Of what a program prints, a sentence may wrap; the line of a table may not.
    content = _PRINTED.sub(
        lambda block: _SENTENCE.sub(r'<span class="sentence">\g<0></span>', block[0]), content
    )

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        formula = convert(html.unescape(match[3]).strip(), display=display) + match[4]
        # A line must not break between the formula and its comma.
        return f'<span class="formula">{formula}</span>' if match[4] else formula

    return _FORMULA.sub(mathml, content)


class TorchRoles(griffe.Extension):
    """The docstrings' roles, which help() shows as torch's do, become Markdown for the site."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = _BLOCK.sub(_display, obj.docstring.value + "\n")
        text = _INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text)
        text = _ROLE.sub(lambda match: _link(match[1], obj), text)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _link(name: str, source: griffe.Object) -> str:
    """To the name's place on the API pages, where it is ours: torch's would need the network."""
    owner = source if source.is_class else source.parent
    if name in sc_bce.__all__:
        return f"[`{name}`][sc_bce.{name}]"
    if owner is not None and owner.name in sc_bce.__all__ and name in owner.members:
        return f"[`{name}`][sc_bce.{owner.name}.{name}]"
    return f"`{name}`"


def _display(match: re.Match[str]) -> str:
    return f"$$\n{' '.join(match[1].split())}\n$$\n\n"
