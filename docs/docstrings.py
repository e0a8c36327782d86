"""What the site does to docstrings before they are read: see `Docstrings`.

An extension of griffe, which reads the code for mkdocstrings; named in mkdocs.yml.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
_SEVERAL = re.compile(r"^ {4}(?P<names>\w+(?:,\s+\w+)+): (?P<told>.*(?:\n {5,}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Makes code of doctests, attributes of a record's `Args`, and a line for each of `a, b: as for f`.

    A record's class docstring tells its fields under `Args`, since that is how they are given, but attrs
    writes the `__init__`, so nothing in the code shows their types there; as attributes they do.
    """

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if isinstance(obj, griffe.Class) and "__init__" not in obj.members:
            text = text.replace("\nArgs:\n", "\nAttributes:\n")
        text = _SEVERAL.sub(_one_by_one, text)
        obj.docstring.value = _DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


def _one_by_one(found: re.Match[str]) -> str:
    names = re.split(r",\s+", found["names"])
    return "\n".join(f"    {name}: {found['told']}" for name in names)
