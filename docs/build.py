"""Builds the documentation's site: python docs/build.py, in the environment of `make docs`.

`.site/html` holds it. Its pages load nothing of another host: `python -m http.server -d .site/html` shows them.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent
SITE = ROOT / ".site"
DIAGRAMS = Path(sys.prefix) / "package" / "dist" / "mermaid.min.js"
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".conf": "nginx", ".json": "json", ".md": "markdown"}
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(?:#L(\d+)|(#[^)\s]*))?(\))")
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)
"""What a browser may load for a page: nothing of another host."""
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("object", "data")}
"""Attributes of what a browser loads by itself, besides `link`, some of which it does not."""


def main() -> None:
    """Copy the pages, build the site, and check it."""
    pages = SITE / "pages"
    shutil.rmtree(SITE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.py", "*.toml", "requirements.txt", "__pycache__")
    shutil.copytree(DOCS, pages, ignore=ignored)
    shutil.copy(DOCS / "zensical.toml", SITE)
    for page in list(pages.rglob("*.md")):
        page.write_text(linked(page.read_text(), DOCS / page.relative_to(pages), pages))
    zensical = Path(sys.executable).with_name("zensical")
    subprocess.run([zensical, "build", "--strict", "--clean"], cwd=SITE, check=True)
    diagrams = SITE / "html" / "assets" / DIAGRAMS.name
    shutil.copy(DIAGRAMS, diagrams)
    for page in (SITE / "html").rglob("*.html"):
        page.write_text(finished(page.read_text(), os.path.relpath(diagrams, page.parent)))
    if faults := list(faults_of(SITE / "html")):
        sys.exit("\n".join(faults))


def linked(text: str, page: Path, pages: Path) -> str:
    """A page whose links to files outside docs/ lead to pages that show these files."""

    def to_source(found: re.Match[str]) -> str:
        before, target, line, anchor, after = found.groups()
        file = (page.parent / target).resolve()
        if not file.is_file():
            raise SystemExit(f"{page.relative_to(ROOT)}: there is no {target}")
        shown = pages / "source" / f"{file.relative_to(ROOT)}.md"
        show(file, shown)
        at = f"#__codelineno-0-{line}" if line else anchor or ""
        here = pages / page.relative_to(DOCS).parent
        return f"{before}{os.path.relpath(shown, here)}{at}{after}"

    return "".join(part if part.startswith("```") else LINK.sub(to_source, part) for part in FENCE.split(text))


def show(file: Path, page: Path) -> None:
    """Write a page with the text of a file, whose lines are anchors."""
    page.parent.mkdir(parents=True, exist_ok=True)
    fence, text = "`" * 5, file.read_text()
    page.write_text(
        f"---\nsearch:\n  exclude: true\n---\n\n# {file.relative_to(ROOT)}\n\n"
        f'{fence} {{.{LANGUAGES.get(file.suffix, "text")} linenums="1"}}\n{text}\n{fence}\n'
    )


def finished(page: str, diagrams: str) -> str:
    """An HTML page with its formulas in MathML, the script of its diagrams, and a policy."""
    page = FORMULA.sub(lambda found: formula(found[2], display=found[1] == "div"), page)
    head = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    if 'class="mermaid"' in page:
        head += f'<script src="{diagrams}"></script>'
    return page.replace("<head>", head, 1)


def formula(text: str, *, display: bool) -> str:
    r"""A formula in \( \) or \[ \], escaped for HTML, as MathML."""
    latex = html.unescape(text).strip()[2:-2].replace(r"\log ", r"\log\, ")  # browsers set no space after an operator
    return convert(latex, display="block" if display else "inline")


class Page(HTMLParser):
    """The anchors of a page, where it links to, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes that matter."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values.get("href", ""))
        self.loaded += [value for name, value in values.items() if (tag, name) in LOADED]


def faults_of(site: Path) -> list[str]:
    """Links and anchors of a built site that lead nowhere, and what its pages load from other hosts."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    faults = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    faults.append(f"{path.relative_to(site)} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                faults.append(f"{path.relative_to(site)} links to {link}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{path.relative_to(site)} links to {link}, an anchor that is not there")
    return sorted(set(faults))


if __name__ == "__main__":
    main()
