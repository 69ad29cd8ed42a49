"""Launch scripts: their dry runs, the commands that they run, and when they restart."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONFIG = str(ROOT / "configs" / "demo_train.yaml")
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DIGEST = "registry/tli_jax@sha256:" + "0123456789abcdef" * 4
# Stand-in for a cloud's command: records its arguments, one call per line, and piped input.
RECORD = f"""#!{sys.executable}
import json, os, sys
piped = "" if sys.stdin.isatty() or "-" not in sys.argv else sys.stdin.read()
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], piped]) + "\\n")
"""


@pytest.fixture
def config(tmp_path):
    """A path that breaks a script with careless quoting, or injects commands into it."""
    file = tmp_path / "a b; touch pwned $(touch pwned) 'x'.yaml"
    file.write_text("model: embedded\noutput: out\ntrain:\n  run: run\n")
    return file


@pytest.fixture
def launch(tmp_path):
    """Run a script in an empty folder with recording commands first on PATH; return stdout, stderr and the calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "xpk"):
        (tmp_path / "bin" / name).write_text(RECORD)
        (tmp_path / "bin" / name).chmod(0o755)
    python = Path(sys.executable).parent
    calls = tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}", "CALLS": str(calls)}

    def launch(script, *words, code=0):
        call = [str(LAUNCH / script), *map(str, words)]
        done = subprocess.run(
            call, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == code, done.stderr
        assert not list(tmp_path.rglob("pwned"))
        found = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done.stdout, done.stderr, found

    return launch


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck(script):
    found = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", script], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
    assert script.name == "lib.sh" or "set -euo pipefail" in script.read_text().splitlines()


def actions(config):
    """Calls for which a dry run and a real run are compared."""
    vm, gke = ["--name", "r1", "--zone", "z"], ["--name", "r1"]
    where = [*vm, "--slice", "v5p-64", "--config", config]
    return {
        "vm create": ["tpu_vm.sh", "create", *vm, "--slice", "v5e-8", "--spot", "--project", "p"],
        "vm create two": ["tpu_vm.sh", "create", *vm, "--slice", "v6e-256", "--slices", "2"],
        "vm status": ["tpu_vm.sh", "status", *vm],
        "vm check": ["tpu_vm.sh", "check", *where],
        "vm run": ["tpu_vm.sh", "run", *where, "--slices", "2", "--port", "9999", "--", "--train.run", "a'b $HOME"],
        "vm logs": ["tpu_vm.sh", "logs", *vm],
        "vm stop": ["tpu_vm.sh", "stop", *vm],
        "vm delete": ["tpu_vm.sh", "delete", *vm],
        "gke xpk": [
            *("gke.sh", "create", *gke, "--slice", "v5p-64", "--config", config, "--image", DIGEST, "--with", "xpk"),
            *("--cluster", "c", "--zone", "z", "--project", "p", "--", "--train.run", "a'b $HOME"),
        ],
        "gke status": ["gke.sh", "status", *gke],
        "gke logs": ["gke.sh", "logs", *gke],
        "gke stop": ["gke.sh", "stop", *gke],
        "slurm": [
            "slurm.sh",
            *gke,
            "--config",
            config,
            "--sbatch",
            "--partition=x y",
            "--",
            "--train.run",
            "a'b $HOME",
        ],
    }


@pytest.mark.parametrize("name", actions("x"))
def test_dry_run_prints_the_commands_of_a_real_run(launch, config, name):
    script, *words = actions(config)[name]
    at = words.index("--") if "--" in words else len(words)
    printed, _, calls = launch(script, *words[:at], "--dry-run", *words[at:])
    assert not calls and printed
    _, _, calls = launch(script, *words)
    assert [[name, *words] for name, words, _ in calls] == [shlex.split(line) for line in printed.splitlines()]


def test_arguments_reach_every_worker_unchanged(launch, config):
    _, _, calls = launch(*actions(config)["vm run"])
    copies = [words for _, words, _ in calls if "scp" in words]
    assert [(words[5], words[6]) for words in copies] == [(str(config), f"r1-{i}:tli_jax/run.yaml") for i in range(2)]
    started = [words for _, words, _ in calls if "ssh" in words]
    assert [words[4] for words in started] == ["r1-0", "r1-1"] and all("--worker=all" in words for words in started)
    line = next(word for word in started[0] if word.startswith("--command="))
    there = shlex.split(line.removeprefix("--command="))
    wanted = "env PATH=.venv/bin:/usr/bin:/bin JAX_COORDINATOR_PORT=9999 bash launch/worker.sh v5p python -m"
    wanted += " tli_jax.upscale --config run.yaml --train.distributed --train.run"
    at = there.index("env")
    assert there[at : at + len(wanted.split()) + 1] == [*wanted.split(), "a'b $HOME"]


def test_check_uses_the_compiler_flags_of_run(launch, config):
    _, _, calls = launch(*actions(config)["vm check"])
    wanted = "bash launch/worker.sh v5p python -m tli_jax.preflight --config run.yaml --train.distributed"
    assert calls[-1][1][-1].endswith(wanted)


def test_slurm_job_gets_the_path_of_the_scripts(launch, config):
    _, _, ((_, words, _),) = launch(*actions(config)["slurm"])
    at = words.index(str(LAUNCH / "slurm_job.sh"))
    assert words[at + 1] == str(LAUNCH)


def test_setup_installs_pinned_versions(launch):
    printed, *_ = launch("tpu_vm.sh", "setup", "--name", "r", "--zone", "z", "--slice", "v5e-8", "--dry-run")
    _, wheel, _, copy, install = (shlex.split(line) for line in printed.splitlines())
    assert wheel[:4] == ["python", "-m", "pip", "wheel"] and "--no-deps" in wheel
    assert copy[-3:] == ["--zone", "z", "--worker=all"] and "r:tli_jax/" in copy
    assert '-c launch/constraints.txt "jax[tpu]"' in install[-1] and "python3.11 -m venv" in install[-1]


def test_packages_are_pinned_at_the_lower_bounds_of_the_project():
    """Those are the versions of Python 3.11, on which the tests run."""
    lines = (LAUNCH / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(requirement.split(">=") for requirement in project["dependencies"])
    together = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    assert {name: pinned[name] for name in together} == {name: bounds[name] for name in together}
    assert pinned["jaxlib"] == pinned["jax"] and "transformers" in pinned


# The part of the JobSet API (v1alpha2) and of batch/v1 that our manifest uses, from the public reference. Other
# properties are refused, and required ones must exist.
def closed(required, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT, WHOLE, NAMES = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
EXIT_CODES = closed(
    "operator values",
    containerName=TEXT,
    operator={"enum": ["In", "NotIn"]},
    values={"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 255},
)
POD_RULE = closed("action", action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)
POD = closed(
    "containers",
    restartPolicy={"const": "Never"},  # podFailurePolicy needs it
    terminationGracePeriodSeconds=WHOLE,
    nodeSelector={"type": "object", "additionalProperties": TEXT},
    volumes={"type": "array"},
    containers={
        "type": "array",
        "items": closed(
            "name",
            **dict.fromkeys(("name", "image", "workingDir"), TEXT),
            command={"type": "array", "items": TEXT},
            env={"type": "array", "items": closed("name", name=TEXT, value=TEXT)},
            ports={"type": "array", "items": closed("containerPort", containerPort=WHOLE)},
            resources=closed("", requests=NAMES, limits=NAMES),
            volumeMounts={"type": "array", "items": closed("name mountPath", name=TEXT, mountPath=TEXT)},
        ),
    },
)
JOB = closed(
    "template",
    **dict.fromkeys(("parallelism", "completions", "backoffLimit"), WHOLE),
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    podFailurePolicy=closed("rules", rules={"type": "array", "items": POD_RULE, "maxItems": 20}),
    template=closed("spec", spec=POD),
)
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RULE = closed(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed("name", name=TEXT, annotations=NAMES),
    spec=closed(
        "replicatedJobs",
        failurePolicy=closed("", maxRestarts=WHOLE, rules={"type": "array", "items": RULE}),
        replicatedJobs={
            "type": "array",
            "items": closed("name template", name=TEXT, replicas=WHOLE, template=closed("spec", spec=JOB)),
        },
    ),
)


@pytest.mark.parametrize(("slice_", "slices", "machines"), [("v5e-8", 1, 2), ("v5p-1024", 1, 128), ("v6e-256", 2, 64)])
def test_manifest(launch, config, slice_, slices, machines):
    words = ["--name", "r1", "--slice", slice_, "--slices", slices, "--config", config, "--image", DIGEST]
    words += ["--claim", "data", "--port", "9999", "--", "--train.run", "a'b $HOME"]
    _, _, calls = launch("gke.sh", "create", *words)
    ((name, called, piped),) = calls
    assert (name, called) == ("kubectl", ["apply", "-f", "-"])
    configmap, jobset = yaml.safe_load_all(piped)
    assert configmap["data"]["run.yaml"] == config.read_text()
    jsonschema.validate(jobset, JOBSET)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert replicated["replicas"] == slices and job["completions"] == job["parallelism"] == machines
    assert machines * container["resources"]["limits"]["google.com/tpu"] * slices == slices * machines * 4
    assert container["image"] == DIGEST
    wanted = ["python", "-m", "tli_jax.upscale", "--config", "/config/run.yaml", "--train.distributed", "--train.run"]
    assert container["command"] == ["/launch/worker.sh", slice_.split("-")[0], *wanted, "a'b $HOME"]
    assert {"name": "JAX_COORDINATOR_PORT", "value": "9999"} in container["env"]
    # Only exit code 75 triggers a restart.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [75]) and job["backoffLimit"] == 0
    assert rule["onExitCodes"]["operator"] == "NotIn" and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gke.sh", "create", "--name", "r", "--slice", "v5e-8", "--image", "tli_jax:latest"], "name it by digest"),
        (["gke.sh", "create", "--name", "R;x"], "name 'R;x'"),
        (["tpu_vm.sh", "create", "--name", "r", "--zone", "z", "--slice", "v9-8"], "slice v9-8: unknown"),
        (["tpu_vm.sh", "fly", "--name", "r", "--zone", "z"], "action fly: unknown"),
        (["tpu_vm.sh", "run", "--name", "r"], "--zone is required"),
        (["slurm.sh", "--name", "r", "--nodez", "2"], "--nodez: unknown option"),
        (["local.sh"], "--config is required"),
        (["local.sh", "--config"], "--config: unknown option, or its value is missing"),
        (["local.sh", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["local.sh", "--config", CONFIG, "--processes", "BASH_VERSINFO[$(touch pwned)]"], "must be an integer"),
        (["slurm.sh", "--name", "r", "--config", CONFIG, "--port", "1,LD_PRELOAD=x"], "must be an integer"),
        (["slurm.sh", "--name", "r", "--config", "nowhere.yaml"], "no such file"),
        (
            ["tpu_vm.sh", "run", "--name", "r", "--zone", "z", "--slice", "v9-8", "--config", CONFIG],
            "v9-8: unknown",
        ),
        (["worker.sh", "tpu", "true"], "platform tpu: unknown"),
    ],
)
def test_wrong_arguments_are_refused(launch, config, words, message):
    needed = ["--config", config] if "create" in words and "gke.sh" in words else []
    _, err, calls = launch(*words, *needed, code=2)
    assert message in err and not calls


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in ("lib.sh", "slurm_job.sh")])
def test_help(launch, script):
    assert f"launch/{script.name}" in launch(script.name, "--help")[0]


@pytest.mark.parametrize(("codes", "worst"), [((0, 0), 0), ((0, 69), 69), ((69, 65), 65), ((65, 69), 65)])
def test_local_returns_the_most_informative_exit_code(tmp_path, codes, worst):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ncodes={shlex.quote(' '.join(map(str, codes)))}\n[[ $* =~ ([01])/2@ ]]\n")
    with python.open("a") as file:
        file.write('read -ra codes <<<"$codes"; exit "${codes[BASH_REMATCH[1]]}"\n')
    python.chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)  # a wrapper, as pyenv's, could put its own folder first on PATH
    call = [LAUNCH / "local.sh", "--config", CONFIG, "--port", "4000"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert subprocess.run(call, env=os.environ | {"PATH": path}).returncode == worst


class TestWorker:
    """worker.sh restarts the command after exit code 75, and only then."""

    @pytest.mark.parametrize("code", [0, 1, 69, 76, 137])
    def test_other_codes_are_final(self, tmp_path, code):
        script = f"echo x >>{shlex.quote(str(tmp_path / 'runs'))}; exit {code}"
        done = subprocess.run([LAUNCH / "worker.sh", "cpu", "bash", "-c", script], check=False)
        assert done.returncode == code and (tmp_path / "runs").read_text() == "x\n"

    def test_75_restarts(self, tmp_path):
        runs = shlex.quote(str(tmp_path / "runs"))
        script = f"echo x >>{runs}; [[ $(wc -l <{runs}) -ge 3 ]] || exit 75"
        done = subprocess.run([LAUNCH / "worker.sh", "cpu", "bash", "-c", script], check=False)
        assert done.returncode == 0 and (tmp_path / "runs").read_text() == "x\n" * 3

    def test_sigterm_lets_the_command_save_and_does_not_restart(self, tmp_path):
        runs, saved = tmp_path / "runs", tmp_path / "saved"
        script = f"trap 'sleep 0.5; touch {saved}; exit 75' TERM; echo x >>{runs}; while :; do sleep 0.05; done"
        worker = subprocess.Popen([LAUNCH / "worker.sh", "cpu", "bash", "-c", script])
        while not runs.exists():
            time.sleep(0.02)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 75
        assert saved.exists() and runs.read_text() == "x\n"

    def test_signal_while_the_command_exits_keeps_its_exit_code(self):
        call = [LAUNCH / "worker.sh", "cpu", "bash", "-c", "trap '' TERM; kill -TERM $PPID; exit 75"]
        assert {subprocess.run(call).returncode for _ in range(20)} == {75}

    def test_a_gpu_leaves_little_memory_unused(self):
        call = [LAUNCH / "worker.sh", "gpu", "bash", "-c", "echo $XLA_PYTHON_CLIENT_MEM_FRACTION"]
        clean = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
        assert subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=clean).stdout == "0.9\n"


def test_dry_runs_in_the_readme_match_the_output():
    text = (LAUNCH / "README.md").read_text()
    blocks = re.findall(r"```console\n\$ (launch/[^\n]*--dry-run[^\n]*)\n(.*?)```", text, re.S)
    assert len(blocks) >= 5
    python = Path(sys.executable).parent
    for command, printed in blocks:
        done = subprocess.run(
            shlex.split(command),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}"},
        )
        assert done.stdout == printed, f"{command}: {done.stderr}"
