"""The report of the claims in docs, and the table of README that is made from it."""

from __future__ import annotations

import json

from qnext.claims.catalogue import CLAIMS
from qnext.claims.report import markdown
from qnext.claims.writing import TITLE
from tests.docs.claims_table import REPORT, ROOT, claims_table, split


def test_the_table_of_readme_is_that_of_the_report() -> None:
    _, shown, _ = split((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown == claims_table()


def test_the_page_is_that_of_the_report() -> None:
    document = json.loads(REPORT.read_text(encoding="utf-8"))
    assert document["form"] == "long"
    page = markdown(document, title=TITLE, picture_folder="claims")
    assert REPORT.with_suffix(".md").read_text(encoding="utf-8") == page
    pictures = [picture["name"] for part in document["scripts"] for picture in part["pictures"]]
    assert {path.stem for path in (REPORT.parent / "claims").iterdir()} == set(pictures)


def test_the_report_has_every_claim() -> None:
    document = json.loads(REPORT.read_text(encoding="utf-8"))
    shown = [(part["number"], claim["field"]) for part in document["scripts"] for claim in part["claims"]]
    assert shown == [(claim.script.number, claim.field) for claim in CLAIMS]
