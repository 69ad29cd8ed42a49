#!/usr/bin/env bash
# Runs several processes on this machine: to try out a multi-host run, or to use one process per GPU.
#
#   launch/local.sh --config FILE [--processes N] [--port PORT] [--platform cpu|gpu] [--dry-run] [-- FLAG...]
#
# --processes  number of processes (default: 2); with --platform gpu, process I uses GPU I only
# --port       port on which process 0 listens (default: a free port)
# --platform   chooses the compiler flags (default: cpu)
# --dry-run    print the commands without running them
#
# Arguments after -- are passed to every process, e.g. -- --train.steps 10. SIGTERM is forwarded to all processes: they
# save and exit with 75, and the same command resumes. If exit codes differ, the most informative one wins: any error,
# then 69 (lost a peer), then 75, then 0.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

config='' processes=2 port='' platform=cpu
read_options "config processes port platform" "$@"
need --config "$config"
check_number --processes "$processes"
[[ -z $port ]] || check_number --port "$port"
if [[ -z $port ]]; then
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

make_command "$config"
children=()
stopping=false
# shellcheck disable=SC2329  # the trap calls it
stop() {
  stopping=true INTERRUPTED=true
  kill -TERM "${children[@]}" 2>/dev/null || true
}
trap stop TERM INT
for ((i = 0; i < processes; i++)); do
  words=()
  for word in "${COMMAND[@]}"; do
    case $word in
      --distributed | --train.distributed) words+=("${word%distributed}process" "$i/$processes@127.0.0.1:$port") ;;
      *) words+=("$word") ;;
    esac
  done
  [[ $platform != gpu ]] || words=(env "CUDA_VISIBLE_DEVICES=$i" "${words[@]}")
  if $dry_run; then
    run "$LAUNCH/worker.sh" "$platform" "${words[@]}"
  else
    "$LAUNCH/worker.sh" "$platform" "${words[@]}" &
    children+=($!)
  fi
done

! $stopping || stop # for children that started after the signal
# Wait for a child and set CODE to its exit code. A signal makes `wait` return early; its trap then sets INTERRUPTED.
wait_for() {
  INTERRUPTED=true
  while $INTERRUPTED; do
    INTERRUPTED=false
    CODE=0
    wait "$1" || CODE=$?
  done
}

# Print how informative an exit code is.
severity() {
  case $1 in
    0) echo 0 ;;
    75) echo 1 ;;
    69) echo 2 ;;
    *) echo 3 ;;
  esac
}

worst=0
for child in "${children[@]}"; do
  wait_for "$child"
  (($(severity "$CODE") <= $(severity "$worst"))) || worst=$CODE
done
exit "$worst"
