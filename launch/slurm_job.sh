#!/usr/bin/env bash
# What slurm.sh hands to sbatch: the command on every GPU; queued again if it leaves with 75, and only then.
#
#   launch/slurm_job.sh FOLDER COMMAND...
set -euo pipefail

launch=$1 code=0 # sbatch runs a copy of this script, which has to be told where the others are
shift
srun --kill-on-bad-exit=0 bash "$launch/worker.sh" gpu "$@" || code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID" || printf 'not queued again\n' >&2 # as with Requeue=0, which is how to stop it
fi
exit "$code"
