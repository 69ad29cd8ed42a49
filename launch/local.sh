#!/usr/bin/env bash
# Several processes on this machine: to try what a pod does, or for one process a GPU.
#
#   launch/local.sh --config FILE [--processes N] [--port PORT] [--platform cpu|gpu] [--dry-run] [-- FLAG...]
#
# --processes  how many (default 2). On GPUs, process I sees GPU I alone
# --port       where process 0 listens (default: a free one)
# --platform   for compiler flags (default cpu)
# --dry-run    print the commands, run nothing
#
# What follows -- goes to every process, e.g. -- --train.steps 10. SIGTERM reaches all of them: they save and leave with
# 75, and the same command goes on. The exit code is 75 only if nothing worse happened to any of them, and 69, a
# peer is gone, only if no other says why.
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
told=false
# shellcheck disable=SC2329  # the trap calls it
stop() {
  told=true INTERRUPTED=true
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

! $told || stop # who was started after it
# Exit code of a child, in CODE. A signal to the script, whose trap sets INTERRUPTED, ends `wait` before the child has.
wait_for() {
  INTERRUPTED=true
  while $INTERRUPTED; do
    INTERRUPTED=false
    CODE=0
    wait "$1" || CODE=$?
  done
}

# How much an exit code says of what went wrong.
weight() {
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
  (($(weight "$CODE") <= $(weight "$worst"))) || worst=$CODE
done
exit "$worst"
