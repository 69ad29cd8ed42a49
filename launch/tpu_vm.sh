#!/usr/bin/env bash
# Runs on Cloud TPU VMs: one slice, or several slices that train together.
#
#   launch/tpu_vm.sh ACTION --name NAME --zone ZONE [--project PROJECT] [--dry-run] …
#
#   create  --slice v5p-64 [--slices N] [--spot]     request the slices as a queued resource
#   status                                           print WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, …
#   setup   --slice S [--slices N]                   install this source tree on every worker
#   check   --slice S [--slices N] --config FILE     run the preflight on every worker
#   run     --slice S [--slices N] --config FILE     start the run on every worker; it survives a lost connection
#   logs    [--slices N]                             follow the log of the first worker
#   stop    [--slices N]                             send SIGTERM to every worker: all save the same step and exit
#   delete                                           delete the slices
#
# --port     port on which process 0 listens (default: chosen by JAX)
# --dry-run  print the commands without running them
#
# Arguments after -- are passed to the command, e.g. -- --train.only all. Calling `run` again resumes the run.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --help | -h | "") usage && exit 0 ;;
esac
action=$1
shift
name='' zone='' project='' slice='' slices=1 config='' port='' spot=false
read_options "name zone project slice slices config port spot" "$@"
need --name "$name"
need --zone "$zone"
check_name "$name"
check_number --slices "$slices"
[[ -z $port ]] || check_number --port "$port"
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")

nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Run a shell command line on every worker of every slice, or with $1 = 0 on the first worker of the first slice.
on_workers() {
  local worker=$1 line=$2 node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" "--worker=$worker" "--command=$line"
    [[ $worker == all ]] || break
  done
}

# Copy files to every worker. The last argument is the destination inside tli_jax/ there.
to_workers() {
  local node from=("${@:1:$#-1}")
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp --recurse "${from[@]}" "$node:tli_jax/${*: -1}" "${where[@]}" --worker=all
  done
}

# Set COMMAND and environment to what every process runs remotely, with the configuration copied to run.yaml.
remote_command() {
  need --slice "$slice"
  need --config "$config"
  kind=$(generation "$slice")
  make_command "$config"
  for i in "${!COMMAND[@]}"; do
    [[ ${COMMAND[i]} != "$config" ]] || COMMAND[i]=run.yaml
  done
  environment=("PATH=.venv/bin:/usr/bin:/bin")
  [[ -z $port ]] || environment+=("JAX_COORDINATOR_PORT=$port")
}

case $action in
  create)
    need --slice "$slice"
    kind=$(generation "$slice")
    runtime=RUNTIME_$kind
    words=("--accelerator-type=${slice/#v5e-/v5litepod-}" "--runtime-version=${!runtime}")
    if ((slices > 1)); then
      words+=("--node-count=$slices" "--node-prefix=$name")
    else
      words+=("--node-id=$name")
    fi
    ! $spot || words+=(--spot)
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${words[@]}"
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
    ;;
  setup)
    need --slice "$slice"
    run rm -rf dist/launch
    run python -m pip wheel --quiet --no-deps --wheel-dir dist/launch "$LAUNCH/.."
    on_workers all "mkdir -p tli_jax && rm -rf tli_jax/launch"
    to_workers dist/launch "$LAUNCH" ""
    # A new machine updates itself and holds the lock for some minutes.
    apt="sudo apt-get -qq -o DPkg::Lock::Timeout=600"
    packages="$apt update && $apt install -y python$PYTHON-venv"
    # A new environment, because pip would keep an older build with the same version.
    venv="cd tli_jax && python$PYTHON -m venv --clear .venv"
    install=".venv/bin/pip install -q -c launch/constraints.txt \"jax[tpu]\" \"\$(ls launch/tli_jax-*.whl)[gcs,data]\""
    on_workers all "$packages && $venv && $install"
    ;;
  check)
    remote_command
    to_workers "$config" run.yaml
    words=(python -m tli_jax.preflight --config run.yaml --train.distributed "${PASSED[@]}")
    on_workers all "cd tli_jax && $(quoted env "${environment[@]}" bash launch/worker.sh "$kind" "${words[@]}")"
    ;;
  run)
    remote_command
    to_workers "$config" run.yaml
    line=$(quoted env "${environment[@]}" bash launch/worker.sh "$kind" "${COMMAND[@]}")
    start="setsid nohup $line >>$name.log 2>&1 </dev/null & echo \$! >$name.pid"
    running="kill -0 \"\$(cat $name.pid 2>/dev/null)\" 2>/dev/null"
    refuse="echo 'error: $name is already running: stop it first' >&2; exit 73"
    on_workers all "cd tli_jax && if $running; then $refuse; else $start; fi"
    ;;
  logs)
    on_workers 0 "tail -n 100 -f tli_jax/$name.log"
    ;;
  stop)
    on_workers all "kill -TERM \"\$(cat tli_jax/$name.pid)\""
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
    ;;
  *) die "action $(quoted "$action"): unknown; see --help" ;;
esac
