"""Claims are judged by intervals, and the short form of everything runs and is written up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qnext.claims.catalogue import CLAIMS
from qnext.claims.claim import Limit, Picture, interval_document
from qnext.claims.notebook import Notebook
from qnext.claims.report import found_text, markdown, number, summary_rows
from qnext.claims.run import chosen_scripts, run_claims
from qnext.claims.scripts import SCRIPTS
from qnext.claims.writing import write_report
from qnext.errors import UsageError
from qnext.eval.intervals import Interval


@pytest.mark.parametrize(
    ("interval", "judgement"),
    [
        (Interval(8, 7.5, 9), "shown"),
        (Interval(8, 6.5, 9), "open"),
        (Interval(5, 4, 6), "not shown"),
        (Interval(8, -math.inf, math.inf), "open"),
        (Interval(11, 10.5, 12), "not shown"),
        (None, "not measured"),
    ],
)
def test_a_claim_shows_with_its_whole_interval(interval: Interval | None, judgement: str) -> None:
    assert Limit(7.0, 10.0).judge(interval) == judgement


def test_every_claim_belongs_to_a_script_that_is_listed() -> None:
    assert {claim.script.number for claim in CLAIMS} == {script.number for script in SCRIPTS}
    fields = [(claim.script.number, claim.field) for claim in CLAIMS]
    assert len(set(fields)) == len(fields)


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (79.674, 3.2526, 4.0e-5, 1234.5, 0.0123)] == [
        "79.7",
        "3.25",
        "4.0e-05",
        "1,234",
        "0.012",
    ]
    assert found_text(interval_document(Interval(1.0, -math.inf, math.inf))) == "1.00 (one run)"


def test_unknown_claims_are_refused() -> None:
    assert [script.number for script in chosen_scripts("c2, C1")] == ["C1", "C2"]
    with pytest.raises(UsageError, match="--only C77"):
        chosen_scripts("C77")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Picture]]:
    return run_claims(SCRIPTS, Notebook(tmp_path_factory.mktemp("claims")), is_long=False)


@pytest.fixture(scope="module")
def short(ran: tuple[dict[str, Any], list[Picture]]) -> dict[str, Any]:
    return ran[0]


def test_the_short_form_measures_every_field_that_a_claim_names(short: dict[str, Any]) -> None:
    missing = [
        f"{part['number']} {claim['field']}"
        for part in short["scripts"]
        for claim in part["claims"]
        if claim["judgement"] == "not measured"
    ]
    assert not missing
    assert all(part["points"]["known"] == part["points"]["of"] > 0 for part in short["scripts"])


def test_counts_of_the_released_model(short: dict[str, Any]) -> None:
    values = {part["number"]: part["values"] for part in short["scripts"]}
    assert values["C1"]["total_billion"]["value"] == pytest.approx(79.674391296)
    assert values["C2"]["percent_of_qwen3-32b"]["value"] == pytest.approx(5.2, abs=0.05)


def test_a_report_says_everything(ran: tuple[dict[str, Any], list[Picture]], tmp_path: Path) -> None:
    path = write_report(*ran, tmp_path)
    text, page = path.read_text(), (tmp_path / "claims.html").read_text()
    document = json.loads((tmp_path / "claims.json").read_text())
    assert markdown(document, title="The published claims, run here", picture_folder="claims") == text
    for part in document["scripts"]:
        assert f"## {part['number']}. {part['title']}" in text
        assert part["prediction"] in text and part["reach"] in text
        for picture in part["pictures"]:
            assert f"(claims/{picture['name']}.svg)" in text
            assert (tmp_path / "claims" / f"{picture['name']}.svg").exists()
    for row in summary_rows(document):
        assert "| " + " | ".join(row) + " |" in text
        assert row[2].replace("**", "") in page
    assert "<script" not in page
