"""Cluster files, as far as they can be checked without a cloud, Kubernetes, Slurm or Docker."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raycompress.source import Source

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"
YAML = sorted(CLUSTERS.rglob("*.yaml"))
SHELL = [CLUSTERS / "local.sh", CLUSTERS / "slurm.sbatch"]
FILES = sorted(p for p in CLUSTERS.rglob("*") if p.is_file())


def read(name):
    return Source.read(CLUSTERS / name).data  # also refuses keys that are given twice


def test_readme_tells_of_every_file_and_no_file_names_a_job():
    readme = (CLUSTERS / "README.md").read_text()
    for path in FILES:
        name = path.relative_to(CLUSTERS).as_posix()
        assert name == "README.md" or name in readme or path.parent.name + "/" in readme, name
    jobs = [path.stem for path in (ROOT / "jobs").glob("*.yaml")]
    for path in FILES:
        text = path.read_text()
        assert not [job for job in jobs if job in text] and "jobs/" not in text, path
    for path in (ROOT / "jobs").rglob("*.yaml"):
        assert "clusters/" not in path.read_text() and "address:" not in path.read_text()


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.relative_to(CLUSTERS).as_posix())
def test_yaml_is_clean(path):
    read(path)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert "\t" not in line and line == line.rstrip(), f"{path}, line {number}"


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_scripts(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("no shellcheck: install the extra raycompress[test]")
    subprocess.run([shellcheck, path], check=True)


def test_the_slurm_script_says_how_it_is_used(tmp_path):
    done = subprocess.run(
        ["bash", CLUSTERS / "slurm.sbatch"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launchers_pass_rays_own_checks(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    broken = copy.deepcopy(config)
    broken["max_workerz"] = 3
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launchers_have_a_head_that_stays_and_workers_that_may_go(name):
    config = read(name)
    types = config["available_node_types"]
    head, workers = types["head"], types["gpu_spot"]
    assert config["head_node_type"] == "head" and head["max_workers"] == 0
    assert not re.search("spot|preemptible", str(head["node_config"]), re.I)
    assert re.search("spot", str(workers["node_config"]), re.I)
    assert 0 < workers["min_workers"] <= workers["max_workers"] <= config["max_workers"]
    start = config["head_start_ray_commands"][-1]
    assert "--num-gpus=0" in start and "--dashboard-host=127.0.0.1" in start
    for command in (start, config["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ray start")
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any("/shared:/shared" in option for option in config["docker"]["run_options"])


CLUSTER_KEYS = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
JOB_KEYS = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "runtimeEnvYAML": str,
    "rayClusterSpec": dict,
}
HEAD_KEYS = {"rayStartParams": dict, "template": dict}
WORKER_KEYS = {
    **HEAD_KEYS,
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
}
POD_KEYS = {"containers": list, "volumes": list, "tolerations": list}
CONTAINER_KEYS = {"name": str, "image": str, "ports": list, "resources": dict, "volumeMounts": list}


def check_keys(data, keys, needed, where):
    """KubeRay prunes what it doesn't know without a word."""
    for key, value in data.items():
        assert key in keys, f"{where} has no {key}"
        assert type(value) is keys[key], f"{where}.{key} must be {keys[key].__name__}"
    assert set(needed) <= set(data), where


def check_pods(template, where):
    assert set(template) == {"spec"}, where
    spec = template["spec"]
    check_keys(spec, POD_KEYS, ["containers", "volumes"], where)
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        check_keys(container, CONTAINER_KEYS, ["name", "image", "resources"], where)
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], where
        assert all(type(amount) is str for amount in resources["limits"].values()), where
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes, where
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"], where
    return spec


def check_cluster(spec):
    check_keys(spec, CLUSTER_KEYS, ["headGroupSpec", "rayVersion", "workerGroupSpecs"], "spec")
    assert spec["authOptions"] == {"mode": "token"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", spec["rayVersion"])
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)  # tokens
    head = spec["headGroupSpec"]
    check_keys(head, HEAD_KEYS, HEAD_KEYS, "headGroupSpec")
    pod = check_pods(head["template"], "head")
    assert "nvidia.com/gpu" not in str(pod) and "tolerations" not in pod
    assert {p["containerPort"] for p in pod["containers"][0]["ports"]} >= {6379, 8265}
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert len(set(names)) == len(names)
    for group in spec["workerGroupSpecs"]:
        check_keys(group, WORKER_KEYS, WORKER_KEYS, "workerGroupSpecs")
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        check_pods(group["template"], group["groupName"])
    for params in (
        head["rayStartParams"],
        *(g["rayStartParams"] for g in spec["workerGroupSpecs"]),
    ):
        assert all(type(value) is str for value in params.values())


def test_kuberay_cluster():
    data = read("kuberay/raycluster.yaml")
    assert (data["apiVersion"], data["kind"]) == ("ray.io/v1", "RayCluster")
    check_cluster(data["spec"])


def test_kuberay_job():
    data = read("kuberay/rayjob.yaml")
    assert (data["apiVersion"], data["kind"]) == ("ray.io/v1", "RayJob")
    spec = data["spec"]
    check_keys(spec, JOB_KEYS, ["entrypoint", "rayClusterSpec"], "RayJob")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    check_cluster(spec["rayClusterSpec"])
    environment = Source.parse(spec["runtimeEnvYAML"], "runtimeEnvYAML").data
    assert all(type(value) is str for value in environment["env_vars"].values())
    assert spec["entrypoint"].startswith("python -m raycompress run /job/")
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "job", "mountPath": "/job"} in head["volumeMounts"]


@pytest.mark.parametrize("change", ["minReplica", "authOption", "replicas"])
def test_the_checks_of_kuberay_find_mistakes(change):
    spec = read("kuberay/raycluster.yaml")["spec"]
    if change == "minReplica":
        spec["workerGroupSpecs"][0]["minReplica"] = 1
    elif change == "authOption":
        spec["authOption"] = spec.pop("authOptions")
    else:
        spec["workerGroupSpecs"][0]["replicas"] = "2"
    with pytest.raises(AssertionError):
        check_cluster(spec)


def test_compose():
    data = read("compose/compose.yaml")
    services = data["services"]
    assert set(services) == {"postgres", "mlflow", "head", "worker"}
    keys = {"image", "build", "command", "environment", "volumes", "ports", "depends_on",
            "healthcheck", "restart", "shm_size", "stop_grace_period"}  # fmt: skip
    for name, service in services.items():
        assert set(service) <= keys, name
        assert "image" in service or "build" in service
        assert set(service.get("depends_on", ())) <= set(services), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to others: {port}"
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in data["volumes"], name
        build = service.get("build")
        if build is not None:
            context = CLUSTERS / "compose" / build["context"]
            assert (context / build["dockerfile"]).resolve().is_file()
    assert "MLFLOW_BACKEND_STORE_URI" in services["mlflow"]["environment"]
    assert services["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["head"]["environment"]["RAY_AUTH_MODE"] == "token"
    text = (CLUSTERS / "compose/compose.yaml").read_text()
    secrets = re.findall(r"\$\{(POSTGRES_PASSWORD|RAY_AUTH_TOKEN)(.)", text)
    assert len(secrets) == 3 and {sign for _, sign in secrets} == {":"}  # required, no default


def test_dashboards_listen_on_loopback():
    for path in FILES:
        for host in re.findall(r"dashboard-host[= ](\S+)", path.read_text()):
            published = path.name == "compose.yaml"  # inside; its port is published on loopback
            assert host == "127.0.0.1" or published, path
