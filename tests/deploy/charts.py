"""The Helm chart, rendered by Helm's own library in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.snippets import ROOT

CHART = ROOT / "deploy" / "helm" / "qnext"
Values = Mapping[str, Any]


def render(good: Mapping[str, Values], bad: Mapping[str, tuple[Values, str]]) -> dict[str, Any]:
    """What Helm makes of each set of values, and the findings of its linter. A bad set comes with a part of the error
    that it is to have. Skips the test where the library is missing."""
    pytest.importorskip("helm_python", reason="helm-python-sdk is not here")
    cases = {**good, **{name: values for name, (values, _) in bad.items()}}
    command = [sys.executable, str(Path(__file__).with_name("render_chart.py")), str(CHART)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def manifests_of(rendered: Mapping[str, Any], case: str) -> dict[str, dict[str, Any]]:
    """Kind to manifest."""
    result = rendered["cases"][case]
    assert "error" not in result, result
    texts = [text for name, text in result["manifests"].items() if name.endswith(".yaml")]
    found = [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]
    kinds = {manifest["kind"]: manifest for manifest in found}
    assert len(kinds) == len(found)
    return kinds
