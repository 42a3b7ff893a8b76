"""The README: short, with numbers of reports/ and links that lead somewhere."""

import re

import pandas as pd
import pytest

from cfclip.evaluation import report
from cfclip.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("data/*.md"), *ROOT.glob("reports/*.md")]


def test_it_is_read_in_a_minute():
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 110


def test_its_table_is_that_of_the_reports():
    summary = pd.read_json(ROOT / "reports" / "metrics.jsonl", lines=True)
    table = report.markdown(summary[[name for name in report.HEADLINE if name in summary]])
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if " % " in line]
    shown = [[cell.strip() for cell in line.split("|")] for line in README.splitlines()]
    assert rows and [row for row in rows if row not in shown] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_its_links_and_those_of_the_other_pages_lead_to_files(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
