"""The chart as Helm renders it: valid Kubernetes objects, confined pods, and settings that the service has."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.support.deploy import dockerfile_instructions, environment_of, image_of
from tests.support.ops_tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "qerve"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
KUBERNETES = "1.33"
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}  # of operators: not in Kubernetes' own schemas
EVERYTHING: dict[str, Any] = {
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "apiKeys": {"existingSecret": "clients"},
    "monitoring": {"serviceMonitor": True, "prometheusRule": True, "dashboard": True, "labels": {"release": "m"}},
    "autoscaling": {"type": "keda"},
    "image": {"pullSecrets": ["registry"]},
    "networkPolicy": {
        "from": [{"podSelector": {"matchLabels": {"app": "gateway"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    },
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "serving",
    "settings": {"kv_cache_memory": 4294967296, "request_timeout_seconds": 0.5, "prefix_caching": False},
}
SOURCES: dict[str, dict[str, Any]] = {
    "hostPath": {"path": "/srv/artifacts/a"},
    "image": {"reference": "registry/artifact:1", "subPath": "model"},
    "initContainer": {"image": "registry/artifact:1", "command": ["cp", "-r", "/artifact/.", "/artifacts/model"]},
    "persistentVolumeClaim": {"claimName": "claim", "subPath": "a"},
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "hpa": {"autoscaling": {"type": "hpa"}, "metrics": {"port": 0}, "monitoring": {"serviceMonitor": True}},
    **{name: {"artifact": {"source": name, name: options}} for name, options in SOURCES.items()},
}


def helm_template(values: dict[str, Any], folder: Path) -> Any:
    (folder / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    arguments = ["template", "r", CHART, "--namespace", "n", "--values", folder / "values.yaml"]
    return run_tool("helm", *arguments, "--kube-version", f"{KUBERNETES}.0", env=environment)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> kind -> object."""
    result = {}
    for case, values in CASES.items():
        done = helm_template(values, tmp_path_factory.mktemp("helm"))
        assert done.returncode == 0, f"{case}: {done.stderr}"
        documents = [document for document in yaml.safe_load_all(done.stdout) if document]
        result[case] = {document["kind"]: document for document in documents}
        assert len(result[case]) == len(documents)
    return result


def pod_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def environment_in(objects: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod_of(objects)["containers"][0]["env"]}


def test_helm_lint_has_no_complaint(tmp_path: Path) -> None:
    linted = run_tool("helm", "lint", "--strict", CHART, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("case", CASES)
def test_every_object_follows_the_schema_of_kubernetes(rendered: dict[str, Any], case: str) -> None:
    for kind, document in rendered[case].items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_schema_of_kubernetes_notices_a_misspelt_key(rendered: dict[str, Any]) -> None:
    broken = copy.deepcopy(rendered["default"]["Deployment"])
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_pods_meet_the_restricted_standard(rendered: dict[str, Any], case: str) -> None:
    pod = pod_of(rendered[case])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_user_port_and_probes_are_those_of_the_image(rendered: dict[str, Any]) -> None:
    image = image_of(dockerfile_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")), "cpu")
    (user,) = [step.arguments for step in image if step.name == "USER"]
    pod = pod_of(rendered["default"])
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    container = pod["containers"][0]
    assert str(container["ports"][0]["containerPort"]) == environment_of(image)["QERVE_PORT"]
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}
    assert pod["enableServiceLinks"] is False  # a service named qerve would set QERVE_PORT


@pytest.mark.parametrize("case", CASES)
def test_environment_sets_what_the_service_reads(rendered: dict[str, Any], case: str) -> None:
    environment = environment_in(rendered[case])
    values = {name.removeprefix("QERVE_").lower(): value for name, value in environment.items()}
    assert set(values) <= set(Settings.model_fields)
    Settings(**values)


def test_numbers_and_switches_keep_their_values(rendered: dict[str, Any]) -> None:
    environment = environment_in(rendered["everything"])
    assert environment["QERVE_KV_CACHE_MEMORY"] == "4294967296"
    assert environment["QERVE_REQUEST_TIMEOUT_SECONDS"] == "0.5"
    assert environment["QERVE_PREFIX_CACHING"] == "false"
    assert environment["QERVE_DEVICE"] == "cuda"


def test_pod_may_drain_before_it_is_killed(rendered: dict[str, Any]) -> None:
    pod = pod_of(rendered["default"])
    (sleep,) = [part for part in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] if "sleep" in part]
    assert f"sleep({VALUES['preStopSeconds']})" in sleep
    drain = float(environment_in(rendered["default"])["QERVE_DRAIN_TIMEOUT_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] > VALUES["preStopSeconds"] + drain


def test_nothing_goes_out_and_metrics_are_let_in_from_their_own_place(rendered: dict[str, Any]) -> None:
    policy = rendered["everything"]["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    sources = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    assert sources == {
        "http": EVERYTHING["networkPolicy"]["from"],
        "metrics": EVERYTHING["networkPolicy"]["metricsFrom"],
    }


def test_selectors_find_the_pods(rendered: dict[str, Any]) -> None:
    objects = rendered["everything"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"].items() <= labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    selected = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert selected <= objects["Service"]["metadata"]["labels"].items()


def test_autoscalers_follow_the_queue_and_own_the_number_of_replicas(rendered: dict[str, Any]) -> None:
    hpa = rendered["hpa"]["HorizontalPodAutoscaler"]["spec"]
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == "qerve_num_requests_waiting"
    (trigger,) = rendered["everything"]["ScaledObject"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'sum(qerve_num_requests_waiting{namespace="n", service="r-qerve"})'
    for case in ("hpa", "everything"):
        assert "replicas" not in rendered[case]["Deployment"]["spec"]
    assert rendered["default"]["Deployment"]["spec"]["replicas"] == VALUES["replicaCount"]


def test_monitoring_scrapes_the_metrics_port_and_ships_the_rules_and_the_dashboard(
    rendered: dict[str, Any], tmp_path: Path
) -> None:
    objects = rendered["everything"]
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == "metrics"
    assert {"action": "replace", "targetLabel": "job", "replacement": "qerve"} in endpoint["relabelings"]
    assert rendered["hpa"]["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == "http"
    shipped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "qerve.yml").read_text(encoding="utf-8"))
    assert objects["PrometheusRule"]["spec"] == shipped
    dashboard = json.loads(objects["ConfigMap"]["data"]["qerve.json"])
    assert dashboard == json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "qerve.json").read_text())


def test_artifact_is_mounted_read_only_from_each_source(rendered: dict[str, Any]) -> None:
    for source in SOURCES:
        pod = pod_of(rendered[source])
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "artifact"]
        assert mount["mountPath"] == pod["containers"][0]["args"][0] == "/artifacts/model"
        assert mount["readOnly"] is True
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "artifact"]
        assert ("emptyDir" if source == "initContainer" else source) in volume
        assert ("initContainers" in pod) is (source == "initContainer")


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCounts": 2},
        {"artifact": {"source": "hostPath"}},
        {"artifact": {"source": "s3"}},
        {"settings": {"port": 9}},
        {"autoscaling": {"type": "vpa"}},
        {"image": {"digest": "sha256:abc"}},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    merged = {name: {**VALUES[name], **given} if isinstance(given, dict) else given for name, given in values.items()}
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid({**VALUES, **merged})


def test_helm_refuses_wrong_values(tmp_path: Path) -> None:
    done = helm_template({"replicaCounts": 2}, tmp_path)
    assert done.returncode != 0
    assert "replicaCounts" in done.stderr


def test_values_follow_their_schema_and_settings_are_ones_of_the_service() -> None:
    jsonschema.validate(VALUES, SCHEMA)
    assert set(VALUES["settings"]) <= set(Settings.model_fields)
    assert set(SCHEMA["properties"]) - {"global"} == set(VALUES)


def test_chart_has_the_version_of_the_package() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"] == version
