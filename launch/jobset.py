"""The Kubernetes manifest of a run on TPU slices: a ConfigMap with its configuration, and a JobSet.

    python launch/jobset.py --name NAME --slice v5p-64 --config FILE --image IMAGE@sha256:… --claim CLAIM [-- WORD...]

The JobSet starts again when a process leaves with 75 (told to stop, everything is saved), and fails at any other code.
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
_CHIPS = 4  # of a machine, in every slice of several machines
_SAVED = 75  # exit code of a process that was told to stop
_NAME = "worker"


def make_manifest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Raises TliError: there is no such slice."""
    topology = parse_topology(options.slice)
    generation, _, shape = topology.name.partition(":")
    if generation not in _ACCELERATOR:
        raise TliError(f"slice {options.slice}: {', '.join(_ACCELERATOR)} are supported on GKE")
    machines = math.prod(map(int, shape.split("x"))) // _CHIPS
    environment = {"JAX_COMPILATION_CACHE_DIR": "/data/compiled", "HF_HUB_CACHE": "/data/hub"}
    if options.port:
        environment["JAX_COORDINATOR_PORT"] = str(options.port)
    container = {
        "name": _NAME,
        "image": options.image,
        "command": ["/launch/worker.sh", generation, *options.words],
        "workingDir": "/data",
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": options.port or 8482}],
        "resources": {"requests": {"google.com/tpu": _CHIPS}, "limits": {"google.com/tpu": _CHIPS}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/config"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # to save in
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
    ends_at = {"containerName": _NAME, "operator": "NotIn", "values": [_SAVED]}
    job = {
        "parallelism": machines,
        "completions": machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": ends_at}]},
        "template": {"spec": pod},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            # A slice of its own for each job.
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
    parser.add_argument("--port", type=int, help="where process 0 listens")
    parser.add_argument("--max-restarts", type=int, default=100)
    parser.add_argument("words", nargs="*", help="the command of every process")
    try:
        manifest = make_manifest(parser.parse_args())
    except TliError as error:
        sys.exit(f"error: {error}")
    yaml.safe_dump_all(manifest, sys.stdout, sort_keys=False, width=120)


if __name__ == "__main__":
    main()
