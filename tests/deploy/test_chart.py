"""The Helm chart, rendered by Helm's own library with several sets of values."""

from __future__ import annotations

import base64
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qnext import __version__
from qnext.cli import VERBS, click_command
from qnext.cli.parsing.config_file import read_flags
from qnext.server.access.hosts import AllowedHosts, parse_host
from qnext.server.limits import Limits
from qnext.server.table import public_routes
from tests.deploy.charts import CHART, manifests_of, render

OLDEST, NEWEST = "1.30.0", "1.37.0"  # of Kubernetes
_MODEL = {"existingClaim": "models"}
_KEYS = {"existingSecret": "team-keys"}
_HASHES = '{"version": 1, "keys": []}'

# What the chart must render.
GOOD: dict[str, dict[str, Any]] = {
    "plain": {"model": _MODEL, "keys": _KEYS},
    "own-secret": {"model": {"hostPath": "/srv/models"}, "keys": {"file": _HASHES}},
    "open": {"model": _MODEL, "keys": {"insecureNoAuth": True}, "networkPolicy": {"allowDns": True, "allowFrom": []}},
    "everything": {
        "replicas": 3,
        "image": {"digest": "sha256:" + "a" * 64},
        "imagePullSecrets": [{"name": "registry"}],
        "model": {**_MODEL, "subPath": "80b-int4", "name": "q"},
        "keys": _KEYS,
        "serve": {
            "log-format": "text",
            "max-num-seqs": 4,
            "max-body-bytes": 12345678,
            "ui": False,
            "allowed-origins": ["https://a", "https://b"],
            "speculative-config": {"num_speculative_tokens": 2},
        },
        "allowedHosts": ["llm.example.org", "*.team.example"],
        "diskCache": {"enabled": True, "gibibytes": 64},
        "audit": {"enabled": True, "chain": True},
        "serviceMonitor": {"enabled": True, "labels": {"release": "p"}, "keySecret": {"name": "metrics-key"}},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "podAnnotations": {"c": "d"},
        "podLabels": {"e": "f"},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "big", "operator": "Exists"}],
        "priorityClassName": "high",
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    },
    "kept-cache": {
        "model": _MODEL,
        "keys": _KEYS,
        "diskCache": {"enabled": True, "existingClaim": "prefixes"},
        "audit": {"enabled": True, "existingClaim": "audit"},
        "preStopSeconds": 0,
        "shutdownTimeoutSeconds": 120,
    },
    "host-cache": {"model": _MODEL, "keys": _KEYS, "diskCache": {"enabled": True, "hostPath": "/var/prefixes"}},
    "keda": {
        "model": _MODEL,
        "keys": _KEYS,
        "autoscaling": {"kind": "keda", "prometheusUrl": "http://prometheus:9090"},
    },
    "kept-log": {"model": _MODEL, "keys": _KEYS, "audit": {"enabled": True, "existingClaim": "audit"}},
    "hpa": {"model": _MODEL, "keys": _KEYS, "autoscaling": {"kind": "hpa", "waiting": 5}},
}

# What it must refuse, and a word of why.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no keys": ({"model": _MODEL}, "exactly one of keys."),
    "two kinds of keys": ({"model": _MODEL, "keys": {**_KEYS, "insecureNoAuth": True}}, "exactly one of keys."),
    "no model": ({"keys": _KEYS}, "exactly one of model."),
    "shared cache": (
        {"model": _MODEL, "keys": _KEYS, "replicas": 2, "diskCache": {"enabled": True, "existingClaim": "c"}},
        "belongs to one replica",
    ),
    "scaled shared cache": (
        {**GOOD["host-cache"], "autoscaling": {"kind": "hpa"}},
        "belongs to one replica",
    ),
    "shared audit log": (
        {"model": _MODEL, "keys": _KEYS, "replicas": 2, "audit": {"enabled": True, "existingClaim": "a"}},
        "belongs to one replica",
    ),
    "two places for one cache": (
        {**GOOD["host-cache"], "diskCache": {"enabled": True, "existingClaim": "a", "hostPath": "/b"}},
        "at most one of diskCache",
    ),
    "keda without prometheus": ({"model": _MODEL, "keys": _KEYS, "autoscaling": {"kind": "keda"}}, "prometheusUrl"),
    "metrics without a key": ({"model": _MODEL, "keys": _KEYS, "serviceMonitor": {"enabled": True}}, "keySecret"),
    "a key in the flags": ({"model": _MODEL, "keys": _KEYS, "serve": {"api-key": "secret"}}, "'api-key'"),
    "another port": ({"model": _MODEL, "keys": _KEYS, "serve": {"port": 1}}, "'port'"),
    "latest": ({"model": _MODEL, "keys": _KEYS, "image": {"tag": "latest"}}, "tag"),
    "a word that is no value": ({"model": _MODEL, "keys": _KEYS, "replicaCount": 2}, "replicaCount"),
}


@cache
def rendered() -> dict[str, Any]:
    return render(GOOD, BAD)


def manifests(case: str) -> dict[str, dict[str, Any]]:
    return manifests_of(rendered(), case)


def pod(case: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifests(case)["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(case: str) -> dict[str, Any]:
    (one,) = pod(case)["containers"]
    return dict(one)


every_case = pytest.mark.parametrize("case", GOOD)


def test_helm_lint_finds_nothing() -> None:
    lint = rendered()["lint"]
    assert lint["total_charts_linted"] == 1 and lint["errors"] == []
    assert [m for m in lint["messages"] if m["severity"] > 1] == []


def test_manifests_are_valid_for_kubernetes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not here")
    # Those of other projects have no schema there; what several cases have in common is looked at once.
    found = [
        m for case in GOOD for m in manifests(case).values() if m["kind"] not in ("ServiceMonitor", "ScaledObject")
    ]
    different = {json.dumps(manifest): manifest for manifest in found}
    for manifest in different.values():
        kubernetes_validate.validate(manifest, OLDEST, strict=True)
    for kind in {manifest["kind"]: manifest for manifest in found}.values():
        kubernetes_validate.validate(kind, NEWEST, strict=True)
    wrong = {**manifests("plain")["Service"], "spec": {"ports": "8000"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_with_a_reason(case: str) -> None:
    result = rendered()["cases"][case]
    assert BAD[case][1] in result.get("error", "rendered")


@every_case
def test_flags_exist_and_have_values_that_the_program_takes(case: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(manifests(case)["ConfigMap"]["data"]["serve.yaml"], encoding="utf-8")
    command = click_command("serve")
    flags = read_flags(file, "serve", command, VERBS)
    context = command.make_context("qnext serve", ["/models"], default_map=flags)
    given = context.params
    assert given["host"] == "0.0.0.0" and given["port"] == 8000
    assert (given["keys"] is None) == bool(given["insecure_no_auth"]) == (case == "open")
    assert container(case)["args"] == ["serve", "/models", "--config=/etc/qnext/serve.yaml"]
    service = manifests(case)["Service"]["metadata"]["name"]
    hosts = AllowedHosts("0.0.0.0", given["allowed_hosts"])
    names = [service, f"{service}.models", f"{service}.models.svc.cluster.local:8000", "10.1.2.3:8000", "localhost"]
    names += ["llm.example.org", "a.team.example"] if case == "everything" else []
    for name in names:
        host = parse_host(name)
        assert host is not None and hosts.allows(host, needs_key=case != "open"), name
    if case == "everything":
        assert given["disk_cache_bytes"] == 64 << 30 and given["max_body_bytes"] == 12345678
        assert given["ui"] is False and len(given["origins"]) == 2 and given["audit_chain"] is True


@every_case
def test_rights_of_the_pod(case: str) -> None:
    spec, one = pod(case), container(case)
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert manifests(case)["ServiceAccount"]["automountServiceAccountToken"] is False
    assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    assert one["resources"]["limits"]["memory"]


@every_case
def test_probes_ask_public_routes(case: str) -> None:
    one = container(case)
    public = {route.path for route in public_routes(open_readiness=True) if route.scope == "public"}
    paths = {name: one[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert set(paths.values()) <= public
    assert paths == {"startup": "/health/ready", "liveness": "/health/live", "readiness": "/health/ready"}
    assert "httpHeaders" not in json.dumps(one), "a key has no place in a pod's description"
    assert one["startupProbe"]["failureThreshold"] * one["startupProbe"]["periodSeconds"] >= 3600


@every_case
def test_the_pod_has_time_to_end(case: str) -> None:
    values = GOOD[case]
    drain = values.get("shutdownTimeoutSeconds", 30)
    sleep = values.get("preStopSeconds", 5)
    assert pod(case)["terminationGracePeriodSeconds"] >= drain + sleep + 15
    assert ("lifecycle" in container(case)) == (sleep > 0)
    assert yaml.safe_load((CHART / "values.yaml").read_text())["shutdownTimeoutSeconds"] == Limits().drain_seconds


@every_case
def test_mounts_and_volumes_belong_together(case: str) -> None:
    spec, one = pod(case), container(case)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in one["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert {name for name, mount in mounts.items() if not mount.get("readOnly")} <= {"tmp", "cache", "audit"}
    if "keys" in volumes:
        # The server refuses a file of keys that others may read.
        assert volumes["keys"]["secret"]["defaultMode"] & 0o037 == 0
    if "persistentVolumeClaim" in volumes["model"]:
        assert volumes["model"]["persistentVolumeClaim"]["readOnly"] is True


def test_files_that_are_kept_have_one_pod_at_a_time() -> None:
    for case in GOOD:
        is_kept = case in ("kept-cache", "host-cache", "kept-log")
        assert manifests(case)["Deployment"]["spec"]["strategy"]["type"] == ("Recreate" if is_kept else "RollingUpdate")


def test_keys_of_the_chart_are_the_file() -> None:
    found = manifests("own-secret")
    assert base64.b64decode(found["Secret"]["data"]["keys.json"]).decode() == _HASHES
    volumes = {volume["name"]: volume for volume in pod("own-secret")["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == found["Secret"]["metadata"]["name"]
    assert "Secret" not in manifests("plain") and "Secret" not in manifests("open")
    template = manifests("own-secret")["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert "checksum/keys" in template


def test_nothing_leaves_the_pod() -> None:
    policy = manifests("plain")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == []
    assert policy["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}]
    dns = manifests("open")["NetworkPolicy"]["spec"]
    assert {port["port"] for rule in dns["egress"] for port in rule["ports"]} == {53}
    assert dns["ingress"] == []


def test_labels_lead_from_service_and_policies_to_the_pods() -> None:
    for case in GOOD:
        found = manifests(case)
        labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
        selectors = [
            found["Deployment"]["spec"]["selector"]["matchLabels"],
            found["Service"]["spec"]["selector"],
            found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
            found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        ]
        assert all(selector and selector.items() <= labels for selector in selectors)


def test_replicas_follow_the_queue() -> None:
    keda, hpa = manifests("keda"), manifests("hpa")
    trigger = keda["ScaledObject"]["spec"]["triggers"][0]["metadata"]
    metric = hpa["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert trigger["query"] == 'sum(qnext_num_requests_waiting{namespace="models", service="demo-qnext"})'
    assert metric == "qnext_num_requests_waiting"
    for found, kind in ((keda, "ScaledObject"), (hpa, "HorizontalPodAutoscaler")):
        assert found[kind]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
        assert "replicas" not in found["Deployment"]["spec"]
    assert manifests("everything")["Deployment"]["spec"]["replicas"] == 3


def test_prometheus_brings_its_key() -> None:
    (endpoint,) = manifests("everything")["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"]["credentials"] == {"name": "metrics-key", "key": "key"}


def test_version_and_defaults() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__
    assert container("plain")["image"] == f"qnext:{__version__}"
    assert container("everything")["image"] == "qnext@sha256:" + "a" * 64
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    assert set(values) <= set(schema["properties"])
    # A flag that the chart sets itself cannot be set beside it.
    own = set(yaml.safe_load(manifests("everything")["ConfigMap"]["data"]["serve.yaml"])["serve"])
    own -= set(GOOD["everything"]["serve"])
    assert own <= set(schema["properties"]["serve"]["propertyNames"]["not"]["enum"])
