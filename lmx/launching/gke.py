"""GKE: a JobSet of one job whose pods are the run's processes, for a slice of TPUs or nodes of GPUs.

Sources: the JobSet API (jobset.x-k8s.io/v1alpha2); Google Cloud's pages "Deploy TPU workloads in GKE Standard", "Cloud
Storage FUSE CSI driver"; what ``xpk`` writes.
"""

import dataclasses
import importlib.metadata
import importlib.util
import re
from typing import Any

import yaml

from lmx.errors import ConfigError
from lmx.launching.job import ASKED_TO_STOP, COORDINATOR_PORT, GRACE_SECONDS, Job, Prepared, read_mounts, run_tool

PROCESSES = "train"  # name of the replicated job, and so a part of its pods' names
SCHEMA = "kubeflow_trainer_api"  # models made from JobSet's and Kubernetes' OpenAPI specifications
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
BUCKET = "gs://"
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123
BUCKET_NAME = r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]"


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``lmx launch gke`` takes.

    Attributes:
      image: container with lmx and the config, in its working directory.
      mount: ``SOURCE:/PATH`` each: a bucket (``gs://NAME``) or a claim of a volume, for the workdir.
      namespace: of Kubernetes; none: kubectl's.
      queue: Kueue's local queue.
      spot: on nodes that may be taken away.
    """

    image: str | None = None
    mount: tuple[str, ...] = ()
    namespace: str | None = None
    queue: str | None = None
    spot: bool = False


def prepare(job: Job, options: Options) -> Prepared:
    """The manifest.

    Raises:
      ConfigError: there is no image, or the workdir is on no mount.
    """
    manifest = jobset(job, options)
    text = yaml.safe_dump(manifest, sort_keys=False, width=1000)
    return Prepared(text, ".yaml", check(yaml.safe_load(text)))


def submit(job: Job, options: Options, prepared: Prepared) -> str:
    """Creates the JobSet; returns what kubectl answered.

    Raises:
      LmxError: kubectl is not there, or the cluster says no.
    """
    # Not `apply`: where a job of that name is there, finished or not, that would change nothing and not say so.
    return run_tool(("kubectl", "create", "--validate=strict", "-f", "-"), prepared.text, "submitting to GKE")


def check(manifest: dict[str, Any]) -> str:
    """Checks a manifest against the specification of JobSet and Kubernetes, where that is installed.

    Raises:
      ValueError: a field is unknown or of a wrong type: a defect of lmx.
    """
    if importlib.util.find_spec(SCHEMA) is None:
        return "not checked: kubeflow-trainer-api, which has JobSet's schema, is not installed (lmx[launch])"
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    # The models leave out what they do not know.
    if JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest:
        raise ValueError("the manifest has fields that JobSet or Kubernetes does not")
    return f"checked by JobSet's and Kubernetes' schema (kubeflow-trainer-api {importlib.metadata.version(SCHEMA)})"


def jobset(job: Job, options: Options) -> dict[str, Any]:
    """The JobSet as plain data.

    Raises:
      ConfigError: as :func:`prepare`.
    """
    for flag, name in (("--namespace", options.namespace), ("--queue", options.queue)):
        if name is not None and not re.fullmatch(LABEL, name):
            raise ConfigError(f"{flag} {name!r} is no name for Kubernetes: a-z, 0-9 and '-', at most 63.")
    for source in read_mounts(options.mount, job.workdir).values():
        if not re.fullmatch(BUCKET_NAME if source.startswith(BUCKET) else LABEL, source.removeprefix(BUCKET)):
            raise ConfigError(f"--mount {source}:…: this is neither gs:// and a bucket's name nor a volume's claim.")
    if not options.image:
        raise ConfigError("lmx launch gke needs --image: a container with lmx and the config in its working directory.")
    metadata: dict[str, Any] = {"name": job.name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if job.devices.hardware.is_tpu and job.devices.hosts > 1:  # the pods of a job share one slice, and no other's
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    # A run that was stopped or evicted always goes on; one that failed does so a number of times.
    rule = {"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [rule | {"onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": PROCESSES, "replicas": 1, "template": {"spec": _processes(job, options)}}],
        },
    }


def _processes(job: Job, options: Options) -> dict[str, Any]:
    """The job: a pod a machine, all of them or none."""
    stopped = {"containerName": PROCESSES, "operator": "In", "values": [ASKED_TO_STOP]}
    evicted = {"type": "DisruptionTarget", "status": "True"}
    rules = [{"onExitCodes": stopped}, {"onPodConditions": [evicted]}]
    return {
        "completionMode": "Indexed",
        "parallelism": job.devices.hosts,
        "completions": job.devices.hosts,
        "backoffLimit": 0,  # processes cannot join a run that goes on: JobSet starts all of them again
        "podFailurePolicy": {"rules": [{"action": "FailJob"} | rule for rule in rules]},
        "template": _pod(job, options),
    }


def _pod(job: Job, options: Options) -> dict[str, Any]:
    devices, mounts = job.devices, read_mounts(options.mount, job.workdir)
    if devices.hardware.is_tpu:
        resource = "google.com/tpu"
        topology = "x".join(map(str, devices.shape))
        nodes = {"cloud.google.com/gke-tpu-accelerator": devices.rented.gke}
        nodes["cloud.google.com/gke-tpu-topology"] = topology
    else:
        resource, nodes = "nvidia.com/gpu", {"cloud.google.com/gke-accelerator": devices.rented.gke}
    if options.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    names = {path: f"mount-{number}" for number, path in enumerate(mounts)}
    volumes = [{"name": names[path]} | _volume(source) for path, source in mounts.items()]
    places = [{"name": name, "mountPath": path} for path, name in names.items()]
    if not devices.hardware.is_tpu:  # NCCL's, which a container's 64 MiB are too few for
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
        places.append({"name": "memory", "mountPath": "/dev/shm"})
    pod: dict[str, Any] = {
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "nodeSelector": nodes,
            "containers": [
                {
                    "name": PROCESSES,
                    "image": options.image,
                    # Kubernetes would put a variable's value for "$(NAME)".
                    "command": [word.replace("$(", "$$(") for word in job.command],
                    "env": _environment(job),
                    "resources": {"limits": {resource: str(devices.chips_per_host)}},
                    "volumeMounts": places,
                }
            ],
            "volumes": volumes,
        }
    }
    if any(source.startswith(BUCKET) for source in mounts.values()):
        pod = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} | pod
    return pod


def _environment(job: Job) -> list[dict[str, Any]]:
    """Variables of a pod. GKE tells TPUs by itself who the others are; GPUs are told here, by JobSet's host names."""
    found: dict[str, Any] = {name: {"value": value.replace("$(", "$$(")} for name, value in job.environment.items()}
    if not job.devices.hardware.is_tpu and job.devices.hosts > 1:
        first = f"{job.name}-{PROCESSES}-0-0.{job.name}"
        found["JAX_COORDINATOR_ADDRESS"] = {"value": f"{first}:{COORDINATOR_PORT}"}
        found["JAX_NUM_PROCESSES"] = {"value": str(job.devices.hosts)}
        found["JAX_PROCESS_ID"] = {"valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    return [{"name": name} | value for name, value in found.items()]


def _volume(source: str) -> dict[str, Any]:
    if not source.startswith(BUCKET):
        return {"persistentVolumeClaim": {"claimName": source}}
    attributes = {"bucketName": source.removeprefix(BUCKET), "mountOptions": "implicit-dirs"}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
