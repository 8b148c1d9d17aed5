"""The chart with `ray.enabled`: KubeRay's RayService, whose arguments and flags the application takes."""

from __future__ import annotations

import importlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from qnext.server.access.hosts import AllowedHosts, parse_host
from tests.deploy.charts import manifests_of, render
from tests.deploy.test_container import stages
from tests.docs.snippets import ROOT

pytest.importorskip("helm_python", reason="helm-python-sdk is not here")

_COMMON: dict[str, Any] = {"model": {"existingClaim": "models"}, "image": {"repository": "qnext-ray"}}
GOOD: dict[str, dict[str, Any]] = {
    "fixed": {**_COMMON, "keys": {"existingSecret": "team"}, "replicas": 2, "ray": {"enabled": True}},
    "scaled": {
        **_COMMON,
        "keys": {"insecureNoAuth": True},
        "ray": {"enabled": True, "maxReplicas": 4, "targetRequests": 12, "cpus": 4, "gpus": 1},
        "diskCache": {"enabled": True, "existingClaim": "prefixes"},
        "audit": {"enabled": True},
        "nodeSelector": {"disk": "fast"},
        "serve": {"max-num-seqs": 3},
    },
    "proxied": {**_COMMON, "keys": {"existingSecret": "team"}, "ray": {"enabled": True, "address": "proxy"}},
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two ways to scale": ({**GOOD["fixed"], "autoscaling": {"kind": "hpa"}}, "ray.maxReplicas"),
    "fewer at most": ({**GOOD["fixed"], "ray": {"enabled": True, "maxReplicas": 1}}, "at least replicas"),
    "none": ({**GOOD["fixed"], "replicas": 0}, "at least 1"),
    "no such address": ({**GOOD["fixed"], "ray": {"enabled": True, "address": "head"}}, "address"),
}


@cache
def rendered() -> dict[str, Any]:
    return render(GOOD, BAD)


def manifests(case: str) -> dict[str, dict[str, Any]]:
    return manifests_of(rendered(), case)


def pods(case: str) -> dict[str, dict[str, Any]]:
    cluster = manifests(case)["RayService"]["spec"]["rayClusterConfig"]
    replicas, routers = cluster["workerGroupSpecs"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "replica": replicas["template"],
        "router": routers["template"],
    }


def name_of_service(case: str) -> str:
    """Where clients ask. Ray's proxy has a service that KubeRay makes."""
    if case == "proxied":
        return f"{manifests(case)['RayService']['metadata']['name']}-serve-svc"
    name: str = manifests(case)["Service"]["metadata"]["name"]
    return name


every_case = pytest.mark.parametrize("case", GOOD)


def test_helm_lint_finds_nothing() -> None:
    assert [message for message in rendered()["lint"]["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_with_a_reason(case: str) -> None:
    assert BAD[case][1] in rendered()["cases"][case].get("error", "rendered")


@every_case
def test_one_kind_of_servers_at_a_time(case: str) -> None:
    kinds = set(manifests(case))
    assert "RayService" in kinds and not kinds & {"Deployment", "HorizontalPodAutoscaler", "ServiceAccount"}
    assert ("Service" in kinds) == (case != "proxied")


@every_case
def test_pods_are_valid_for_kubernetes(case: str) -> None:
    """KubeRay's own kinds have no schema here; their pods are pods."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not here")
    for name, template in pods(case).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name, **template["metadata"]}}
        kubernetes_validate.validate(pod, "1.30.0", strict=True)
    for kind in manifests(case).keys() & {"NetworkPolicy", "Service"}:
        kubernetes_validate.validate(manifests(case)[kind], "1.30.0", strict=True)


@every_case
def test_the_application_takes_its_arguments_and_flags(case: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not here")
    sys.path.insert(0, str(ROOT / "deploy"))
    try:
        ray_serve = importlib.import_module("ray_serve")
    finally:
        sys.path.pop(0)
    config = yaml.safe_load(manifests(case)["RayService"]["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (ROOT / "deploy" / f"{module}.py").is_file() and name == "app"
    arguments = ray_serve.AppArguments(**application["args"])
    assert arguments.config == "/etc/qnext/serve.yaml"
    replicas = {"fixed": (2, None), "scaled": (None, 4), "proxied": (1, None)}
    assert (arguments.replicas, arguments.max_replicas) == replicas[case]
    file = tmp_path / "serve.yaml"
    file.write_text(manifests(case)["ConfigMap"]["data"]["serve.yaml"], encoding="utf-8")
    values = ray_serve.flag_values(arguments.model, str(file))
    assert values["open_readiness"] is True and values["insecure_no_auth"] is (case == "scaled")
    hosts = AllowedHosts("0.0.0.0", values["allowed_hosts"])
    name = name_of_service(case)
    for text in (name, f"{name}.models.svc.cluster.local:8000", "10.1.2.3:8001"):
        host = parse_host(text)
        assert host is not None and hosts.allows(host, needs_key=case != "scaled")


@every_case
def test_a_pod_has_one_replica_or_one_router_and_the_head_has_none(case: str) -> None:
    spec = manifests(case)["RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    cluster = spec["rayClusterConfig"]
    group, routers = cluster["workerGroupSpecs"]
    for found, argument in ((group, "resource"), (routers, "router_resource")):
        resource = application["args"][argument]
        assert json.loads(json.loads(found["rayStartParams"]["resources"].strip("'"))) == {resource: 1}
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert "resources" not in head and head["num-cpus"] == "0"
    assert {routers[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {application["args"]["routers"]}
    assert float(group["rayStartParams"]["num-cpus"]) == application["args"]["cpus"]
    assert float(group["rayStartParams"]["num-gpus"]) == application["args"]["gpus"]
    assert cluster["enableInTreeAutoscaling"] is (case == "scaled")
    least, most = {"fixed": (2, 2), "scaled": (1, 4), "proxied": (1, 1)}[case]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (least, least, most)


@every_case
def test_rights_mounts_and_time_of_the_pods(case: str) -> None:
    for template in pods(case).values():
        spec = template["spec"]
        (one,) = spec["containers"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == 10001
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in one["env"]
        assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in one["volumeMounts"]}
        # Running answers end while the pod sleeps, wherever they are, and some time is left behind that.
        assert one["lifecycle"]["preStop"]["sleep"]["seconds"] == 5 + 30
        assert spec["terminationGracePeriodSeconds"] >= 5 + 30 + 15
        assert one["resources"]["limits"]["memory"]


@every_case
def test_only_the_address_is_open_to_callers(case: str) -> None:
    found = manifests(case)["NetworkPolicy"]["spec"]
    selected = set(found["podSelector"]["matchLabels"].items())
    for template in pods(case).values():
        assert selected <= set(template["metadata"]["labels"].items())
    callers, cluster = found["ingress"]
    assert callers["ports"] == [{"port": 8000 if case == "proxied" else 8001, "protocol": "TCP"}]
    own, operator = cluster["from"]
    assert set(own["podSelector"]["matchLabels"].items()) == selected
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-operator"}
    ports = {port["port"] for rule in found["egress"] for port in rule.get("ports", ())}
    assert ports == ({53, 443, 6443} if case == "scaled" else {53})


@pytest.mark.parametrize("case", ["fixed", "scaled"])
def test_clients_reach_the_routers_own_port_when_a_model_is_loaded(case: str) -> None:
    """The head must not wait for a model: KubeRay starts the application when the head is ready."""
    flags = yaml.safe_load(manifests(case)["ConfigMap"]["data"]["serve.yaml"])["serve"]
    assert (flags["host"], flags["open-readiness"]) == ("0.0.0.0", True)
    service = manifests(case)["Service"]["spec"]
    (port,) = service["ports"]
    for role, template in pods(case).items():
        (one,) = template["spec"]["containers"]
        is_selected = service["selector"].items() <= template["metadata"]["labels"].items()
        assert is_selected is (role == "router") is ("readinessProbe" in one) is ("ports" in one)
        if is_selected:
            assert one["ports"] == [{"name": port["targetPort"], "containerPort": flags["port"], "protocol": "TCP"}]
            assert one["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": port["targetPort"]}
    config = yaml.safe_load(manifests(case)["RayService"]["spec"]["serveConfigV2"])
    assert config["http_options"]["port"] != flags["port"], "Ray's proxy is in the same pod"


def test_rays_proxy_is_an_option() -> None:
    flags = yaml.safe_load(manifests("proxied")["ConfigMap"]["data"]["serve.yaml"])["serve"]
    assert not {"host", "port"} & flags.keys()
    for template in pods("proxied").values():
        (one,) = template["spec"]["containers"]
        assert "readinessProbe" not in one, "KubeRay has one that asks the proxy"


def test_the_image_has_what_the_extra_asks_for() -> None:
    text = (ROOT / "deploy" / "Dockerfile.ray").read_text(encoding="utf-8")
    (stage,) = stages(text)
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = project["optional-dependencies"]["ray"]
    assert extra in project["optional-dependencies"]["dev"]
    runs = [one.text for one in stage if one.name == "RUN"]
    assert f'"{extra}"' in runs[-1]
    assert [one.text for one in stage if one.name == "USER"][-1] == "10001:10001"
    ignored = (ROOT / "deploy" / "Dockerfile.ray.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for one in stage if one.name == "COPY" for word in one.text.split()[:-1]]
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
