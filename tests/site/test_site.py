"""The documentation's site: it builds, is complete, needs no network, and links that lead nowhere end the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.pages import ROOT

pytestmark = pytest.mark.site
DOCS = ROOT / "docs"
PYTHON = ROOT / ".venv-docs" / "bin" / "python"


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    """The environment of `make docs`; where its packages cannot be had, the tests are skipped."""
    done = subprocess.run(["make", ".venv-docs/.ready"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the environment of `make docs` cannot be had: {done.stderr.strip()[-200:]}")


def built(root: Path) -> subprocess.CompletedProcess[str]:
    """The site of a project's docs/, in its .site/html."""
    return subprocess.run([PYTHON, root / "docs" / "build.py"], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, of a copy of the project's files."""
    root = copied(tmp_path_factory.mktemp("project"))
    done = built(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / ".site" / "html"


def copied(root: Path) -> Path:
    """A copy of docs/ and of what its pages link to."""
    left_out = shutil.ignore_patterns("__pycache__", "*.onnx", "*.npz", ".*")
    for folder in ("docs", "service", "training", "experiments", "examples", "tests", "deploy", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    for name in ("README.md", "CHANGELOG.md", "Makefile", "docker-compose.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


def test_every_page_is_in_the_site(site: Path) -> None:
    """And is found by the navigation."""
    project = tomllib.loads((DOCS / "zensical.toml").read_text())["project"]
    named = re.findall(r"'([\w/-]+\.md)'", str(project["nav"]))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(named) == pages
    assert len(named) == len(pages)
    assert all((site / page).with_suffix(".html").is_file() for page in pages)


def test_pages_load_nothing_of_another_host(site: Path) -> None:
    """No script, style, font or picture; browsers are told so by a policy."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        found = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*", text)
        assert [tag for tag in found if 'rel="canonical"' not in tag] == [], page.name
        assert page.name == "404.html" or "default-src 'self'" in text
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style.name


def test_formulas_and_diagrams_need_no_network(site: Path) -> None:
    """Formulas are MathML; the script of diagrams is the site's own."""
    page = (site / "mathematics.html").read_text()
    assert page.count("<math ") > 30
    assert "arithmatex" not in page
    page = (site / "architecture.html").read_text()
    (script,) = re.findall(r'<script src="([^"]*mermaid[^"]*)"', page)
    assert (site / script).stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](api.md#nowhere)", "an anchor that is not there"),
        ("[x](../training/models/vae.py#L100000)", "an anchor that is not there"),
        ("[x](../training/nowhere.py)", "there is no ../training/nowhere.py"),
        ('<img src="https://example.com/x.png">', "loads https://example.com/x.png"),
        ("![x](pictures/nowhere.png)", "nowhere.png"),
    ],
)
def test_a_fault_ends_the_build(tmp_path: Path, added: str, fault: str) -> None:
    """Its message names the fault."""
    root = copied(tmp_path)
    with (root / "docs" / "api.md").open("a") as page:
        page.write(f"\n{added}\n")
    done = built(root)
    assert done.returncode != 0
    assert fault in re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
