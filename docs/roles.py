"""How docstrings come into the API page: their roles (``:class:`~a.b.C```) as the code that they name."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?(?:class|func|meth|attr|data|mod|exc):`(?P<short>~?)(?P<name>[^`]+)`")


def plain(text: str) -> str:
    """A docstring without roles; names that start with ``~`` are shortened to their last part."""
    return _ROLE.sub(lambda found: f"`{found['name'].rpartition('.')[2] if found['short'] else found['name']}`", text)


class Roles(griffe.Extension):
    """Takes roles out of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
