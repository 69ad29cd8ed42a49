"""Writes the Kubernetes manifest of a run on TPU slices: a ConfigMap with the configuration, and a JobSet.

    python launch/jobset.py --name NAME --slice v5p-64 --config FILE --image IMAGE@sha256:… --claim CLAIM [-- WORD...]

The JobSet restarts when a process exits with 75 (stopped, everything saved), and fails on any other code.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from tli_jax.distributed.topology import parse_topology
from tli_jax.errors import TliError

_ACCELERATOR = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
_CHIPS = 4  # per machine, in every slice with several machines
_PREEMPTED = 75  # exit code of a process that was stopped and saved everything
_NAME = "worker"


def make_manifest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Raise TliError if the slice is unknown or GKE does not support it."""
    topology = parse_topology(options.slice)
    generation, _, shape = topology.name.partition(":")
    if generation not in _ACCELERATOR:
        raise TliError(f"slice {options.slice}: GKE supports {', '.join(_ACCELERATOR)}")
    machines = math.prod(map(int, shape.split("x"))) // _CHIPS
    environment = {"JAX_COMPILATION_CACHE_DIR": "/data/compiled", "HF_HUB_CACHE": "/data/hub"}
    if options.port:
        environment["JAX_COORDINATOR_PORT"] = str(options.port)
    container = {
        "name": _NAME,
        "image": options.image,
        "command": ["/launch/worker.sh", generation, *options.command],
        "workingDir": "/data",
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": options.port or 8482}],
        "resources": {"requests": {"google.com/tpu": _CHIPS}, "limits": {"google.com/tpu": _CHIPS}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/config"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # time to save
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": _ACCELERATOR[generation],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "config", "configMap": {"name": options.name}},
        ],
    }
    failing = {"containerName": _NAME, "operator": "NotIn", "values": [_PREEMPTED]}
    job = {
        "parallelism": machines,
        "completions": machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": failing}]},
        "template": {"spec": pod},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            # One slice per job.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": options.name},
        "data": {"run.yaml": Path(options.config).read_text(encoding="utf-8")},
    }
    return [config, jobset]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--slice", required=True)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--config", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim, mounted at /data on every machine")
    parser.add_argument("--port", type=int, help="port on which process 0 listens")
    parser.add_argument("--max-restarts", type=int, default=100)
    parser.add_argument("command", nargs="*", help="command that every process runs")
    try:
        manifest = make_manifest(parser.parse_args())
    except TliError as error:
        sys.exit(f"error: {error}")
    yaml.safe_dump_all(manifest, sys.stdout, sort_keys=False, width=120)


if __name__ == "__main__":
    main()
