#!/usr/bin/env bash
# Runs on TPU slices of Google Kubernetes Engine, as a JobSet created by kubectl or by xpk.
#
#   launch/gke.sh ACTION --name NAME [--dry-run] …
#
#   create  --slice v5p-64 [--slices N] --config FILE --image IMAGE@sha256:DIGEST --claim CLAIM [--port PORT]
#           [--with xpk --cluster CLUSTER --zone ZONE --project PROJECT]
#   status
#   logs
#   stop    delete the JobSet: every process saves and exits; `create` resumes the run
#
# --image     built from launch/Dockerfile and pushed to your registry; named by digest, so every restart runs the same
# --claim     PersistentVolumeClaim, mounted at /data on every machine: model, text and run directory
# --with xpk  use the storage attached by `xpk storage attach`, and the configuration inside the image
# --dry-run   print the commands without running them
#
# Arguments after -- are passed to the command, e.g. -- --train.only all.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --help | -h | "") usage && exit 0 ;;
esac
action=$1
shift
name='' slice='' slices=1 config='' image='' claim='' port='' with=kubectl cluster='' zone='' project=''
read_options "name slice slices config image claim port with cluster zone project" "$@"
need --name "$name"
check_name "$name"
check_number --slices "$slices"
[[ -z $port ]] || check_number --port "$port"
jobs=jobset.sigs.k8s.io/jobset-name=$name

case $action in
  create)
    need --slice "$slice"
    need --config "$config"
    [[ $image =~ @sha256:[0-9a-f]{64}$ ]] || die "image $(quoted "$image"): name it by digest, NAME@sha256:…"
    generation "$slice" >/dev/null
    make_command "$config"
    case $with in
      kubectl)
        need --claim "$claim"
        for i in "${!COMMAND[@]}"; do
          [[ ${COMMAND[i]} != "$config" ]] || COMMAND[i]=/config/run.yaml
        done
        words=(--name "$name" --slice "$slice" --slices "$slices" --config "$config" --image "$image" --claim "$claim")
        [[ -z $port ]] || words+=(--port "$port")
        if $dry_run; then
          printf '%s | kubectl apply -f -\n' "$(quoted python "$LAUNCH/jobset.py" "${words[@]}" -- "${COMMAND[@]}")"
        else
          python "$LAUNCH/jobset.py" "${words[@]}" -- "${COMMAND[@]}" | kubectl apply -f -
        fi
        ;;
      xpk)
        need --cluster "$cluster"
        need --zone "$zone"
        need --project "$project"
        environment=()
        [[ -z $port ]] || environment+=("JAX_COORDINATOR_PORT=$port")
        line=$(quoted env "${environment[@]}" /launch/worker.sh "$(generation "$slice")" "${COMMAND[@]}")
        run xpk workload create --workload "$name" --cluster "$cluster" --zone "$zone" --project "$project" \
          "--tpu-type=${slice/#v5e-/v5litepod-}" "--num-slices=$slices" --docker-image "$image" --command "$line" \
          --max-restarts=100 --restart-on-exit-codes=75
        ;;
      *) die "with $(quoted "$with"): must be kubectl or xpk" ;;
    esac
    ;;
  status)
    run kubectl get jobset "$name"
    run kubectl get pods "--selector=$jobs"
    ;;
  logs)
    first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run kubectl logs --follow "--selector=$jobs,$first" --tail=100
    ;;
  stop)
    run kubectl delete jobset "$name" --ignore-not-found
    run kubectl delete configmap "$name" --ignore-not-found
    ;;
  *) die "action $(quoted "$action"): unknown; see --help" ;;
esac
