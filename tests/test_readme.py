"""What the README and the tests' page say is what is there: their tags, their links, their files."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "README.md", ROOT / "tests" / "README.md"
README, TESTS = (page.read_text(encoding="utf-8") for page in PAGES)
# The book: the most lines of code that each file may have, where it has a limit of its own, and that a function may.
LIMITS = {"model.py": (150, 50), "minicfrl.py": (300, 50), "ntk.py": (120, 50), "fast_ntk.py": (95, 50)}
LIMITS |= {"train_toy.py": (120, 40)}
BOOK = [ROOT / name for name in LIMITS]


def tags(text):
    return set(re.findall(r"\(E\d+\)", text))


def test_every_equation_of_the_readme_has_its_line_of_code_and_the_other_way_round():
    """Their sets are equal."""
    book = "".join(path.read_text(encoding="utf-8") for path in BOOK)
    implemented = tags("".join(re.findall(r"# .*?\(E\d+\)|\(E\d+\)$", book, re.MULTILINE)))
    assert tags(README) == tags(book) == implemented


def test_the_readme_is_a_page():
    """Limits that this project has set itself."""
    assert README.count("\n") <= 140 and "±" not in README
    for row in re.findall(r"^\| (.*) \|$", README, re.MULTILINE):
        assert all(len(cell.split()) <= 12 for cell in row.split(" | ") if " = " not in cell), row


def lines_of_code(path):
    """The numbers of a file's lines that are not blank, comment or docstring; and those of each function."""
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    prose = {
        line
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = {
        n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")
    } - prose
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return len(lines), [len(lines & set(range(f.lineno, f.end_lineno + 1))) for f in functions]


def test_the_book_is_short():
    """A limit that this project has set itself, because the book is there to be read."""
    counts = {path.name: lines_of_code(path) for path in BOOK}
    assert sum(lines for lines, _ in counts.values()) <= 750
    for name, (lines, functions) in counts.items():
        assert lines <= LIMITS[name][0] and max(functions) <= LIMITS[name][1], (name, lines, max(functions))


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_link_to_is_there(page):
    """Files beside the page, and headings or anchors in them, as a code host names them; not its own pages."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|\.\./\.\./actions)(.*?)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            there = file.read_text(encoding="utf-8")
            headings = [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", there, re.M)
            ]
            assert anchor in headings or f'<a id="{anchor}">' in there, target


def test_the_tests_that_the_pages_name_are_there():
    """Those of the laboratory by their path."""
    names = re.findall(r"(?:[a-z]+/)*(?:test_\w+|mutants|benchmark|tiny|faults)\.py", README + TESTS)
    assert len(names) > 20 and all((ROOT / (name if "/" in name else f"tests/{name}")).exists() for name in names)


@pytest.mark.parametrize("path", [*BOOK, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_the_book_imports_three_packages_and_neither_it_nor_its_tests_the_laboratory(path):
    """And matplotlib, for a picture."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert "experiments" not in packages
    if path in BOOK:
        assert packages <= {"torch", "tqdm", "tiktoken", "matplotlib"} | {other.stem for other in BOOK}
