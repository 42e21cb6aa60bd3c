"""The tables of mutants are what mutants.py can run, and no function hogs them."""

import ast
from collections import Counter

import pytest
from mutants import ROOT, TABLES, rows_of

ROWS = [row for table in TABLES for row in rows_of(table)]


@pytest.mark.parametrize("file", sorted({row["file"] for row in ROWS}))
def test_a_mutant_breaks_one_place_and_no_function_has_more_than_five(file):
    text, owners = (ROOT / file).read_text(encoding="utf-8"), Counter()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for row in (row for row in ROWS if row["file"] == file):
        assert text.count(row["old"]) == 1 and row["old"] != row["new"], row
        line = text[: text.index(row["old"].strip("\n"))].count("\n") + 1
        around = [node for node in functions if node.lineno <= line <= node.end_lineno]
        owners[min(around, key=lambda node: node.end_lineno - node.lineno).name if around else row["old"]] += 1
    assert max(owners.values()) <= 5, owners


def test_a_mutant_names_a_claim_or_a_file_of_them():
    """A file where the claim that falls is not known yet: mutants.py writes its name."""
    for row in ROWS:
        file, _, name = row["claim"].partition("::")
        text, case = (ROOT / file).read_text(encoding="utf-8"), name.removesuffix("::runTest")
        assert f"def {name}(" in text or f"{case} = " in text or not name, row
