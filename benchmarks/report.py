"""What the pages and the JSON of study and speed share."""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any


@lru_cache
def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def rounded(value: Any, digits: int) -> Any:
    """The same with every float rounded to so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are aligned to the right."""
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(words: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The words with each ``@name`` line replaced by that part, whose own lines are filled too."""

    def part(found: re.Match[str]) -> str:
        if found[1] not in parts:
            known = ", ".join(f"@{name}" for name in parts)
            raise ValueError(f"Expected one of {known}, but the words have @{found[1]}")
        return fill(parts[found[1]](), parts)

    return re.sub(r"^@([\w-]+)$", part, words, flags=re.M)
