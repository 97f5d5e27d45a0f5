"""What docs/containers.md says is so. Run: pytest tests/containers/test_containers_documentation.py"""

import re
import shlex
import shutil
import subprocess

import click
import kubernetes_validate
import pytest
import yaml
from command import ROOT, containerize
from container_steps import steps

from phi3_mlflow.containers.cli import containerize as command

DOCUMENT = (ROOT / "docs" / "containers.md").read_text("utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)]


def block(kind: str) -> dict:
    (found,) = [each for each in BLOCKS if each.get("kind") == kind]
    return found


def test_every_command_that_writes_a_folder_does(onnx_model, tmp_path):
    lines = re.findall(r"^phi3-mlflow (containerize .*)$", DOCUMENT, re.MULTILINE)
    assert len(lines) == 3
    for number, line in enumerate(lines):
        _, uri, folder, *more = shlex.split(line)
        assert (uri, folder) == ("models:/phi3@champion", "./phi3-container")
        given = [] if "--memory" in more else ["--memory", "1GiB"]
        result = containerize(onnx_model, tmp_path / str(number), *more, *given)
        assert result.exit_code == 0, result.output


def test_every_option_that_is_named_is_one():
    known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    named = {
        option for line in re.findall(r"containerize .*", DOCUMENT) for option in re.findall(r" (--?[a-z]+)", line)
    }

    assert {"--image", "--cpus", "--parallel", "--memory", "-c"} <= named
    assert named - {"--memory", "--task"} <= known


def test_the_table_has_all_that_is_in_the_folder(folder):
    rows = re.search(r"\| in the folder.*?\n\n", DOCUMENT, re.DOTALL)[0].strip().splitlines()
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w./]+)`", row.split("|")[1])}

    assert named == {path.name for path in folder.iterdir()}


def test_what_docker_is_told_is_in_the_dockerfile(folder, torch_folder):
    found = list(steps((torch_folder / "Dockerfile").read_text()))

    arguments = {value.partition("=")[0] for name, value in found if name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", DOCUMENT)) | {"TORCH_INDEX"} == arguments
    stages = {value.partition(" AS ")[2] for name, value in found if name == "FROM"}
    assert set(re.findall(r"--target (\w+)", DOCUMENT)) <= stages
    assert set(re.findall(r"--env-file \./phi3-container/(\S+)", DOCUMENT)) == {"kubernetes/settings.env"}
    assert (folder / "kubernetes" / "settings.env").is_file()
    user = dict(found)["USER"].partition(":")[0]
    assert f"The user is {user}," in DOCUMENT


def test_the_numbers_are_those_of_the_files(folder):
    scaler = yaml.safe_load((folder / "kubernetes" / "horizontalpodautoscaler.yaml").read_text())["spec"]
    assert f"from {scaler['minReplicas']} to {scaler['maxReplicas']} copies" in DOCUMENT
    settings = (folder / "kubernetes" / "settings.env").read_text()
    assert f"{re.search('DRAIN=([0-9]+)', settings)[1]} (`DRAIN`)" in DOCUMENT
    policy = yaml.safe_load((folder / "kubernetes" / "networkpolicy.yaml").read_text())["spec"]
    ((label, value),) = policy["ingress"][0]["from"][1]["namespaceSelector"]["matchLabels"].items()
    assert f'`{label}: "{value}"`' in DOCUMENT


def test_prometheus_and_the_gateway_mean_what_is_there(folder):
    deployment = yaml.safe_load((folder / "kubernetes" / "deployment.yaml").read_text())
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    monitor = block("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]

    assert monitor["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    created = re.search(r"secret generic (\S+) --from-literal=(\w+)=\S+ --from-literal=(\w+)=", DOCUMENT).groups()
    credentials = endpoint["authorization"]["credentials"]
    assert created == (secret["name"], secret["key"], credentials["key"])
    assert credentials["name"] == secret["name"]
    (rule,) = next(each for each in BLOCKS if "rules" in each)["rules"]["custom"]
    scaler = yaml.safe_load((folder / "kubernetes" / "horizontalpodautoscaler.yaml").read_text())["spec"]
    assert f'__name__="{scaler["metrics"][0]["pods"]["metric"]["name"]}"' in rule["seriesQuery"]
    service = yaml.safe_load((folder / "kubernetes" / "service.yaml").read_text())
    gateway = block("DestinationRule")["spec"]
    assert gateway["host"] == service["metadata"]["name"]
    header = gateway["trafficPolicy"]["loadBalancer"]["consistentHash"]["httpHeaderName"]
    assert f"$http_{header.replace('-', '_')} $conversation" in (folder / "nginx.conf").read_text()


def test_the_overlay_mounts_the_model(folder, tmp_path):
    overlay = block("Kustomization")
    (patch,) = overlay["patches"]
    operations = yaml.safe_load(patch["patch"])
    paths = [each["path"] for each in operations]
    assert paths == ["/spec/template/spec/volumes/-", "/spec/template/spec/containers/0/volumeMounts/-"]
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    shutil.copytree(folder / "kubernetes", tmp_path / "kubernetes")
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(tmp_path / "mounted")]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        deployment = next(each for each in yaml.safe_load_all(text) if each["kind"] == "Deployment")
    else:
        deployment = yaml.safe_load((folder / "kubernetes" / "deployment.yaml").read_text())
        pod = deployment["spec"]["template"]["spec"]
        pod["volumes"].append(operations[0]["value"])
        pod["containers"][0]["volumeMounts"].append(operations[1]["value"])
    kubernetes_validate.validate(deployment, "1.32", strict=True)
    pod = deployment["spec"]["template"]["spec"]
    mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "model": "/model"}
    assert {each["name"] for each in pod["volumes"]} == set(mounts)


@pytest.mark.parametrize("path", re.findall(r"python (\S+\.py)", DOCUMENT))
def test_scripts_that_are_named_are_there(path):
    assert (ROOT / path).is_file()
