"""What Kubernetes and KServe are given, against their schemas, and each file against the others.

Where kubectl is installed, what kustomize makes of the folder is checked; else the listed files, one by one.
Run: pytest tests/containers/test_manifests.py
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from phi3_mlflow.containers.write import PORT, USER
from phi3_mlflow.serve.metrics import _ENGINE_GAUGES

# The oldest that is supported by its makers or a cloud, and the newest that the package has.
VERSIONS = ["1.32", "1.37"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module", params=["onnx", "transformers"])
def made(request, folder, torch_folder) -> Path:
    return {"onnx": folder, "transformers": torch_folder}[request.param]


@pytest.fixture(scope="module")
def resources(made) -> dict[str, Any]:
    """What is applied, by kind."""
    kustomization = load(made / "kubernetes" / "kustomization.yaml")
    listed = [load(made / "kubernetes" / name) for name in kustomization["resources"]]
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(made / "kubernetes")]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        rendered = {each["kind"]: each for each in yaml.safe_load_all(text)}
        assert set(rendered) == {each["kind"] for each in listed} | {"ConfigMap"}
        return rendered
    (generator,) = kustomization["configMapGenerator"]
    lines = (made / "kubernetes" / generator["envs"][0]).read_text().splitlines()
    data = dict(line.split("=", 1) for line in lines)
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}
    return {each["kind"]: each for each in [*listed, config]}


@pytest.fixture
def container(resources) -> dict[str, Any]:
    (only,) = resources["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_fits_the_schema(resources, version):
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_resource_with_a_wrong_field_would_not(resources):
    spoiled = {**resources["Service"], "spec": {**resources["Service"]["spec"], "selectors": {}}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoiled, VERSIONS[0], strict=True)


def test_the_kustomization_lists_every_file(made):
    kustomization = load(made / "kubernetes" / "kustomization.yaml")
    files = {path.name for path in (made / "kubernetes").iterdir()}

    assert {*kustomization["resources"], "settings.env", "kustomization.yaml"} == files


def test_everything_means_the_same_pods(resources):
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"]

    assert resources["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    target = resources["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", resources["Deployment"]["metadata"]["name"])
    pod = resources["Deployment"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == resources["ServiceAccount"]["metadata"]["name"]


def test_settings_come_from_the_config_map_and_keys_from_a_secret_that_is_not_here(resources, container):
    (source,) = container["envFrom"]
    assert source["configMapRef"]["name"] == resources["ConfigMap"]["metadata"]["name"]
    (variable,) = container["env"]
    assert variable["name"] == "PHI3_MLFLOW_API_KEYS"
    # Not optional: without the secret no pod starts.
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "phi3-api-keys", "key": "keys"}}
    assert "Secret" not in resources
    assert all(name.startswith("PHI3_MLFLOW_SERVE_") for name in resources["ConfigMap"]["data"])


def test_probes_ask_the_routes_that_need_no_key_and_wait_for_a_load(container, resources):
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    probe, data = container["startupProbe"], resources["ConfigMap"]["data"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= int(data["PHI3_MLFLOW_SERVE_LOAD_TIMEOUT"])
    grace = resources["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace > sleep + int(data["PHI3_MLFLOW_SERVE_DRAIN"])


def test_a_pod_can_do_little(container, resources):
    pod = resources["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["automountServiceAccountToken"] is False
    # A Service called phi3-mlflow-serve would set PHI3_MLFLOW_SERVE_PORT=tcp://...
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    policy = resources["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "egress" not in policy  # nothing goes out
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [PORT]


def test_the_autoscaler_looks_at_a_metric_that_the_server_has(resources):
    (metric,) = resources["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm:num_requests_waiting"
    assert metric["pods"]["metric"]["name"] in _ENGINE_GAUGES


def test_the_process_has_as_many_threads_as_cores(container, resources):
    config = resources["ConfigMap"]["data"]["PHI3_MLFLOW_SERVE_CONFIG"]
    cores = container["resources"]["limits"]["cpu"]

    assert f"threads={cores}" in config.split()
    assert int(container["resources"]["requests"]["memory"][:-2]) < int(container["resources"]["limits"]["memory"][:-2])


# What KServe 0.21 has beside the fields of a pod, of those that are used (V1beta1PredictorSpec, V1beta1ModelSpec).
PREDICTOR = {"minReplicas": int, "maxReplicas": int, "timeout": int}
MODEL = {"modelFormat": dict, "protocolVersion": str, "storageUri": str}


def own(fields: dict[str, Any], known: dict[str, type]) -> dict[str, Any]:
    """Takes KServe's own fields out, checked for their types; what is left is Kubernetes'."""
    for name, kind in known.items():
        if name in fields:
            assert isinstance(fields.pop(name), kind), name
    return fields


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


def test_kserve_is_given_the_same_container_for_openais_protocol(made, container, resources):
    service = load(made / "kserve" / "openai.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = own(service["spec"]["predictor"], PREDICTOR)
    kubernetes_validate.validate(pod(predictor), VERSIONS[0], strict=True)
    (there,) = predictor["containers"]
    assert there["name"] == "kserve-container"
    variables = {each["name"]: each.get("value") for each in there["env"]}
    assert variables == {**resources["ConfigMap"]["data"], "PHI3_MLFLOW_API_KEYS": None}
    for name in ("image", "resources", "securityContext", "volumeMounts"):
        assert there[name] == container[name]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert {**there[name], "httpGet": {**there[name]["httpGet"], "port": "http"}} == container[name]


def test_kserve_is_given_the_folder_in_mlflows_format(made):
    service = load(made / "kserve" / "mlflow.yaml")
    predictor = own(service["spec"]["predictor"], PREDICTOR)
    model = own(predictor.pop("model"), MODEL)

    assert predictor == {}
    # The rest is a container's, but for name and image, which the runtime has.
    kubernetes_validate.validate(pod({"containers": [{"name": "a", "image": "a", **model}]}), VERSIONS[0], strict=True)
    text = (made / "kserve" / "mlflow.yaml").read_text()
    assert re.search(r"modelFormat: \{name: mlflow\}", text)
