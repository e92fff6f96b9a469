"""What the documents name is there: files of the repository and public names of the package."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES]
FOLDERS = ["benchmarks", "csrc", "docs", "examples", "experiments", "kernels", "python", "tests"]
FILE = re.compile(r"[\w./-]*\w\.(?:py|pyi|cpp|hpp|toml|md|png)\b")
FOLDER = re.compile(r"`([\w./-]+/)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
PLACEHOLDERS = {"NAME", "TASK", "mine"}  # in the name of a file that the reader makes


@pytest.fixture(scope="module")
def paths():
    """Every path of the repository with a slash before and, if it is a folder, after it."""
    found = [path for folder in FOLDERS for path in [ROOT / folder, *(ROOT / folder).rglob("*")]]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    return [f"/{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_folders_exist(document, paths):
    text = (ROOT / document).read_text()
    named = {name for name in FILE.findall(text) + FOLDER.findall(text) if Path(name).stem not in PLACEHOLDERS}
    assert {name for name in named if not any(path.endswith(f"/{name}") for path in paths)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = LINK.findall((ROOT / document).read_text())
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_package_exist(document):
    for name in re.findall(r"\bmlpint(?:\.[A-Za-z_]\w*)+", (ROOT / document).read_text()):
        assert pkgutil.resolve_name(name) is not None
