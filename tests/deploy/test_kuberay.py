"""The manifest for KubeRay without Helm is what the chart makes of the values beside it.

`python -m tests.deploy.test_kuberay` writes it anew, after a change of the chart or of the values.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.charts import manifests_of, render
from tests.docs.snippets import ROOT

FOLDER = ROOT / "deploy" / "kuberay"
MANIFEST = FOLDER / "rayservice.yaml"
_HEAD = """# Replicas of qnext by KubeRay, without Helm: kubectl apply -n models -f rayservice.yaml
# It is what the chart makes of values.yaml; deploy/README.md says what has to be there before.
"""
_OF_HELM = ("app.kubernetes.io/managed-by", "helm.sh/chart")


def made() -> list[dict[str, Any]]:
    """The chart's manifests without what only Helm's own need."""
    values = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
    found = manifests_of(render({"stand-alone": values}, {}), "stand-alone")
    return [_plain(found[kind]) for kind in sorted(found, key=lambda kind: (kind == "RayService", kind))]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: "qnext" if name == "app.kubernetes.io/instance" else _plain(each)
        for name, each in value.items()
        if name not in _OF_HELM and not (name == "namespace" and each == "models")
    }


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _of_lines(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _of_lines)


def text_of(manifests: list[dict[str, Any]]) -> str:
    documents = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120) for each in manifests]
    return _HEAD + "---\n".join(documents)


def test_the_manifest_is_that_of_the_chart() -> None:
    pytest.importorskip("helm_python", reason="helm-python-sdk is not here")
    kept = MANIFEST.read_text(encoding="utf-8")
    assert list(yaml.safe_load_all(kept)) == made()
    assert "demo" not in kept and "helm" not in kept.partition("---")[2].lower(), "no trace of a release"


if __name__ == "__main__":
    MANIFEST.write_text(text_of(made()), encoding="utf-8")
