"""README and docs: links lead somewhere, files and modules that are named exist, snippets run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qcompile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GLOSSARY = "docs/glossary.md"
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FOLDERS = (".", "qcompile", "passes")  # that names of files in the text start from


def pages(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]


def anchors(page: Path) -> list[str]:
    """Of all headings, as GitHub and mkdocs make them."""
    text = _FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(page: Path) -> list[str]:
    """Relative ones; those in code are no links."""
    text = re.sub(r"`[^`\n]+`", "", _FENCED.sub("", page.read_text()))
    return [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def broken_links(root: Path) -> Iterator[str]:
    for page in pages(root):
        for link in links(page):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                yield f"{page.relative_to(root)}: {link}: no such file"
            elif anchor and anchor not in anchors(target):
                yield f"{page.relative_to(root)}: {link}: no such heading"


def missing_files(root: Path) -> Iterator[str]:
    """Source files that the text names in backticks, and modules in its commands."""
    for page in pages(root):
        if page.name == "CHANGELOG.md":  # names of its time
            continue
        text = page.read_text()
        named = re.findall(r"`((?:[\w.-]+/)+\w+\.py)`", text)
        named += [f"{m.replace('.', '/')}.py" for m in re.findall(r"python -m (\w+\.[\w.]+)", text)]
        for name in named:
            package = f"{name.removesuffix('.py')}/__main__.py"
            paths = [root / folder / n for folder in _FOLDERS for n in (name, package)]
            if not any(path.is_file() for path in paths):
                yield f"{page.relative_to(root)}: {name}: no such file"


def test_links_lead_to_files_and_headings() -> None:
    assert list(broken_links(ROOT)) == []


def test_files_that_are_named_exist() -> None:
    assert list(missing_files(ROOT)) == []


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("[a](docs/other.md#q-and-dq)", 0),
        ("[a](https://example.org/x.md) `[a](gone.md)`", 0),
        ("```\n[a](gone.md)\n# gone\n```", 0),
        ("[a](docs/gone.md)", 1),
        ("[a](docs/other.md#gone)", 1),
        ("# Here\n[a](#here) [b](#there)", 1),
        ("```\n# there\n```\n[b](#there)", 1),
    ],
)
def test_a_broken_link_is_seen(tmp_path: Path, text: str, faults: int) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Title\n## `Q` and DQ!\n")
    (tmp_path / "README.md").write_text(text)
    assert len(list(broken_links(tmp_path))) == faults


@pytest.mark.parametrize("text", ["`ir/gone.py`", "python -m tools.gone x"])
def test_a_missing_file_is_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert len(list(missing_files(tmp_path))) == 1


def unexplained(root: Path) -> list[str]:
    """Terms of the glossary that no page, its own entries among them, links to."""
    linked = {link.partition("#")[2] for page in pages(root) for link in links(page)}
    return [term for term in anchors(root / GLOSSARY)[1:] if term not in linked]


def test_every_term_is_linked_where_it_is_used() -> None:
    terms = anchors(ROOT / GLOSSARY)[1:]
    assert len(set(terms)) == len(terms)
    assert unexplained(ROOT) == []


def test_a_term_that_nothing_links_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / GLOSSARY).write_text("# Glossary\n### Gate\n### Lost term\n")
    (tmp_path / "README.md").write_text("[a gate](docs/glossary.md#gate)")
    assert unexplained(tmp_path) == ["lost-term"]


def unlisted(root: Path) -> list[str]:
    """Pages of docs/ that its index does not link to."""
    listed = {link.partition("#")[0] for link in links(root / "docs" / "index.md")}
    names = (page.name for page in sorted((root / "docs").glob("*.md")))
    return [name for name in names if name not in (*listed, "index.md")]


def test_the_index_lists_every_page() -> None:
    assert unlisted(ROOT) == []


def test_a_page_that_the_index_lacks_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[data](data.md#formats)")
    for name in ("data.md", "scale.md"):
        (tmp_path / "docs" / name).touch()
    assert unlisted(tmp_path) == ["scale.md"]


def undocumented(page: str) -> set[str]:
    """Public names of the package that the API reference does not show."""
    return set(qcompile.__all__) - {"__version__"} - set(re.findall(r"\w+", page))


def test_the_reference_shows_all_that_is_public() -> None:
    page = (DOCS / "api.md").read_text()
    assert undocumented(page) == set()
    assert undocumented(page.replace("sensitivity", "")) == {"sensitivity"}


def test_the_snippet_finds_the_schema() -> None:
    page = (DOCS / "json.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found = json.loads('{"outputs": 1}')
    names: dict[str, Any] = {"found": found}
    with pytest.raises(Exception, match="required property") as caught:
        exec(code, names)
    assert type(caught.value).__name__ == "ValidationError"
