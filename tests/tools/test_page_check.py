"""What page_check says of pages: what is missing, which pages there are, faults in short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import page_check
from tools.page_check import MODULES, Fault, MissingError, Tools, faults, in_short, pages

BAD = (
    "<!DOCTYPE html><html><head><title>x</title></head><body><main><h1>x</h1><img src='data:,'>"
    "<p style='width: 600px'>x</p></main></body></html>"
)
GOOD = (
    '<!DOCTYPE html><html lang="en"><head><title>x</title><link rel="icon" href="data:,">'
    "</head><body><main><h1>x</h1></main></body></html>"
)


def installed(folder: Path) -> Path:
    for name in ("puppeteer-core", "axe-core"):
        (folder / name).mkdir(parents=True)
        (folder / name / "package.json").write_text("{}")
    return folder


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"^puppeteer-core is not in .*npm install"):
        Tools.found("", "", tmp_path)
    modules = installed(tmp_path / "node_modules")
    with pytest.raises(MissingError, match=r"^no-such-node is not installed: --node PATH"):
        Tools.found("no-such-node", sys.executable, modules)
    with pytest.raises(MissingError, match="--chromium PATH"):
        Tools.found(sys.executable, "no-such-browser", modules)
    assert Tools.found(sys.executable, sys.executable, modules).modules == modules


def test_the_command_ends_with_2_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["page_check", "x.html", "--modules", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        page_check.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_stand_for_their_pages(tmp_path: Path) -> None:
    for name in ("b.html", "sub/a.html", "404.html", "x.css"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert pages([tmp_path]) == [tmp_path / "b.html", tmp_path / "sub" / "a.html"]
    with pytest.raises(MissingError, match="no page"):
        pages([tmp_path / "c.html"])


def test_equal_faults_are_one_line() -> None:
    found = [Fault("a.html", "no label", "dark", "input"), Fault("b.html", "no label")]
    found.append(Fault("b.html", "12 pages when printed"))
    assert list(in_short(found)) == [
        "a.html (dark): no label: input [and in 1 other views]",
        "b.html: 12 pages when printed",
    ]


@pytest.fixture
def tools() -> Tools:
    try:
        return Tools.found("", "", MODULES)
    except MissingError as missing:
        pytest.skip(str(missing))


def test_a_browser_sees_faults(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    (tmp_path / "good.html").write_text(GOOD)
    assert list(faults([tmp_path / "good.html"], tools, most_paper=1)) == []
    found = {fault.what for fault in faults([tmp_path / "bad.html"], tools, most_paper=0)}
    assert any(what.startswith("axe image-alt") for what in found)
    assert any(what.startswith("axe html-has-lang") for what in found)
    assert "scrolls sideways" in found
    assert any("when printed" in what for what in found)
