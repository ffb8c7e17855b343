"""The manifest is read back, checked by JobSet's own schema, and its variables are those that processes look for."""

import copy

import pytest
import yaml

from lmx.cli import main
from lmx.launching import gke
from lmx.parallel.processes import environment
from tests.launching.jobs import AWKWARD, arguments, command, fake, launch, refused

TPU, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def pod_of(manifest):
    return job_of(manifest)["template"]["spec"]


@pytest.mark.parametrize(
    ("devices", "hosts", "limits", "nodes"),
    [
        ("v4:2x2x4", 4, {"google.com/tpu": "4"}, {TPU: "tpu-v4-podslice", TOPOLOGY: "2x2x4"}),
        ("v5e:1x1", 1, {"google.com/tpu": "1"}, {TPU: "tpu-v5-lite-podslice", TOPOLOGY: "1x1"}),
        ("v5e:4x4", 4, {"google.com/tpu": "4"}, {TPU: "tpu-v5-lite-podslice", TOPOLOGY: "4x4"}),
        ("v5p:2x2x4", 4, {"google.com/tpu": "4"}, {TPU: "tpu-v5p-slice", TOPOLOGY: "2x2x4"}),
        ("v6e:4x4", 4, {"google.com/tpu": "4"}, {TPU: "tpu-v6e-slice", TOPOLOGY: "4x4"}),
        ("tpu7x:2x2x2", 2, {"google.com/tpu": "4"}, {TPU: "tpu7x", TOPOLOGY: "2x2x2"}),
        ("h100:16", 2, {"nvidia.com/gpu": "8"}, {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}),
        ("a100:4", 1, {"nvidia.com/gpu": "4"}, {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}),
    ],
)
def test_a_pod_a_machine_and_all_of_its_chips(capsys, devices, hosts, limits, nodes):
    text, said = launch(capsys, "gke", devices)
    manifest = yaml.safe_load(text)
    job, pod = job_of(manifest), pod_of(manifest)
    assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", hosts, hosts)
    assert pod["nodeSelector"] == nodes and pod["containers"][0]["resources"]["limits"] == limits
    assert ("annotations" in manifest["metadata"]) == (TPU in nodes and hosts > 1)
    assert "checked" in said


def test_a_run_that_was_stopped_goes_on(capsys):
    manifest = yaml.safe_load(launch(capsys, "gke", "v5e:4x4", "--max-restarts", "3")[0])
    job, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], job["backoffLimit"], pod_of(manifest)["restartPolicy"]) == (3, 0, "Never")
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    exits, evicted = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"]["values"] == [143] and evicted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert exits["onExitCodes"]["containerName"] == pod_of(manifest)["containers"][0]["name"]


def test_gpu_processes_find_each_other(capsys):
    """With the completion index that Kubernetes puts in, and the host name that JobSet gives the first pod."""
    manifest = yaml.safe_load(launch(capsys, "gke", "h100:16", "--name", "big")[0])
    variables = {one["name"]: one for one in pod_of(manifest)["containers"][0]["env"]}
    field = variables.pop("JAX_PROCESS_ID")["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    replicated = manifest["spec"]["replicatedJobs"][0]["name"]
    found = environment({name: one["value"] for name, one in variables.items()} | {"JAX_PROCESS_ID": "1"})
    first = f"big-{replicated}-0-0.big:8476"
    assert found == {"coordinator_address": first, "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize("devices", ["h100:8", "v5e:4x4"])
def test_processes_that_are_told_otherwise_are_not_told_twice(capsys, devices):
    """One alone needs nobody, and TPUs are told by GKE."""
    assert pod_of(yaml.safe_load(launch(capsys, "gke", devices)[0]))["containers"][0]["env"] == []


def test_the_command_comes_through_yaml_and_kubernetes_as_it_was_typed(capsys):
    manifest = yaml.safe_load(launch(capsys, "gke", "v5e:4x4", AWKWARD, "--env", "A=$(B)", "--env", "C=yes")[0])
    (container,) = pod_of(manifest)["containers"]
    expanded = [word.replace("$$(", "$(") for word in container["command"]]  # and no "$(" would be left alone
    assert expanded == command(AWKWARD) and all("$(" not in word.replace("$$(", "") for word in container["command"])
    assert container["env"] == [{"name": "A", "value": "$$(B)"}, {"name": "C", "value": "yes"}]


def test_options(capsys):
    more = ["--namespace", "lab", "--queue", "team", "--spot", "--mount", "claim:/data"]
    manifest = yaml.safe_load(launch(capsys, "gke", "h100:16", *more)[0])
    assert manifest["metadata"]["namespace"] == "lab"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    pod = pod_of(manifest)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {place["mountPath"]: volumes[place["name"]] for place in pod["containers"][0]["volumeMounts"]}
    assert places["/runs"]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert places["/data"]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert places["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    annotations = job_of(manifest)["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "true"}
    assert "lmx launch gke needs --image" in refused(capsys, "gke", "h100:16", "--image", "")


@pytest.mark.parametrize("devices", ["v5e:4x4", "tpu7x:2x2x2", "h100:16"])
def test_the_schema_of_jobset_takes_it_and_no_other(capsys, devices):
    pytest.importorskip("kubeflow_trainer_api")
    more = ["--namespace", "lab", "--queue", "team", "--spot", "--mount", "claim:/data", "--env", "A=b"]
    text, said = launch(capsys, "gke", devices, *more)
    assert "checked by JobSet's and Kubernetes' schema (kubeflow-trainer-api" in said
    for change in (
        lambda manifest: manifest["spec"]["failurePolicy"].update(maxRestart=3),
        lambda manifest: job_of(manifest).update(parallel=3),
        lambda manifest: job_of(manifest).update(completions="3"),
        lambda manifest: pod_of(manifest)["containers"][0].update(volumeMount=[]),
        lambda manifest: pod_of(manifest)["containers"][0].pop("name"),
        lambda manifest: manifest["spec"]["replicatedJobs"][0].pop("name"),
    ):
        manifest = yaml.safe_load(text)
        gke.check(copy.deepcopy(manifest))
        change(manifest)
        with pytest.raises(ValueError):
            gke.check(manifest)


def test_kubectl_is_given_what_the_dry_run_shows(capsys, tmp_path, monkeypatch):
    fake(tmp_path / "bin", monkeypatch, kubectl=f'cat > {tmp_path}/taken; echo "$*"')
    shown, _ = launch(capsys, "gke", "v5e:4x4", AWKWARD)
    _, said = launch(capsys, "gke", "v5e:4x4", AWKWARD, "--submit")
    assert (tmp_path / "taken").read_text() == shown
    assert "submitted: create --validate=strict -f -" in said


def test_what_the_cluster_says_against_a_job_is_told(capsys, tmp_path, monkeypatch):
    fake(tmp_path / "bin", monkeypatch, kubectl='echo "jobsets is forbidden" >&2; exit 1')
    assert main(arguments("gke", "v5e:4x4", "--submit")) == 2
    assert "jobsets is forbidden" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--namespace", "no such NS!"], "--namespace 'no such NS!' is no name for Kubernetes"),
        (["--queue", "Bad Queue"], "--queue 'Bad Queue' is no name"),
        (["--mount", "gs://Bad_bucket!!:/more"], "--mount gs://Bad_bucket!!"),
        (["--mount", "gs://bucket/folder:/more"], "a bucket's name"),
    ],
)
def test_names_that_kubernetes_would_not_take(capsys, flags, message):
    assert message in refused(capsys, "gke", "v5p:2x2x4", *flags)
