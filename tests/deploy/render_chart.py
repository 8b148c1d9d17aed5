"""Renders the Helm chart by Helm's own library, in a process of its own: a Go runtime stays out of the tests'.

Arguments: the chart. Standard input: {case: values}. Standard output:
{"lint": messages, "cases": {case: {"manifests": {file: text}} or {"error": text}}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    import helm_python

    chart_path = sys.argv[1]
    cases: dict[str, dict[str, Any]] = json.load(sys.stdin)
    rendered: dict[str, Any] = {}
    with helm_python.Chart.load(chart_path) as chart:
        for name, values in cases.items():
            try:
                chart.validate_schema(values)
                rendered[name] = {"manifests": chart.render(values, name="demo", namespace="models")}
            except helm_python.HelmError as error:
                rendered[name] = {"error": str(error)}
    lint = helm_python.lint(chart_path, next(iter(cases.values())), strict=True)
    json.dump({"lint": lint, "cases": rendered}, sys.stdout)


if __name__ == "__main__":
    main()
