"""What `make bench-gpu` tells, in tiny shapes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from qnext.ops import triton as gpu

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def report(*flags: str) -> dict[str, Any]:
        """The report of a machine; of the self-tests, which are tests of their own, the first two."""
        out = tmp_path / "report.json"
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(gpu, "SELF_TESTS", gpu.SELF_TESTS[:2])
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--smallest", "--out", str(out), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(BENCHMARKS / "check_gpu.py"), run_name="__main__")
        assert end.value.code == 0
        found: dict[str, Any] = json.loads(out.read_text())
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
        return found

    return report


def test_errors_times_and_a_step(reported: Any) -> None:
    found = reported("--without-engine")
    assert len(found["errors"]) == 2 and all(error < 1e-4 for error in found["errors"].values())
    assert len(found["times"]) == 12 and all(each["seconds"] > 0 for each in found["times"])
    assert found["step"]["tokens_per_second"] > 0


@pytest.mark.slow
def test_the_figures_of_an_engine(reported: Any) -> None:
    figures = reported()["engine"]["figures"]
    assert [(each["batch"], each["graphs"]) for each in figures] == [(0, True), (2, True)]
    assert figures[0]["seconds"] > 0 and figures[1]["tokens_per_second"] > 0
