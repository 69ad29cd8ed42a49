#!/usr/bin/env bash
# Runs a command on one machine of a run, and restarts it whenever it exits with 75.
#
#   launch/worker.sh v5e|v5p|v6e|gpu|cpu COMMAND...
#
# Exit code 75 means stopped with everything saved: the same command resumes. Every other exit code is final. If this
# script itself receives SIGTERM, the machine is going away: the command can save, and is not restarted.
# Compiled programs are cached in JAX_COMPILATION_CACHE_DIR.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --help | -h | "")
    usage
    exit 0
    ;;
esac
platform=$1
shift
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/tli_jax/compiled}
case $platform in
  gpu) export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} ;;
  v5e | v5p | v6e | cpu) ;;
  *) die "platform $platform: unknown, use v5e, v5p, v6e, gpu or cpu" ;;
esac

exec python3 "$LAUNCH/restart.py" "$@"
