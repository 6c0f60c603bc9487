"""HTML and SVG elements whose text is escaped by construction: only ``Markup`` is not escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

# Not allowed in HTML: control characters, and lone surrogates, which JSON can hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff￾￿]")
_VOID = {"br", "input", "link", "meta", "wbr"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = str | int | float | Iterable["Child"] | None
Attribute: TypeAlias = str | int | float | bool | None


def text(value: object) -> Markup:
    """A value as HTML: special characters escaped, forbidden ones replaced."""
    return Markup(escape(_FORBIDDEN.sub("�", str(value)), quote=True))


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other; None is nothing."""
    return Markup("".join(_child(c) for c in children))


def tag(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """One element. ``class_`` is class, ``data_value`` is data-value; True is a bare attribute."""
    spelled = "".join(_attribute(k, v) for k, v in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{spelled}>")
    return Markup(f"<{name}{spelled}>{join(children)}</{name}>")


def _child(value: Child) -> str:
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value
    if isinstance(value, str | int | float):
        return text(value)
    return join(value)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    spelled = name.rstrip("_").replace("_", "-")
    return f" {spelled}" if value is True else f' {spelled}="{text(value)}"'
