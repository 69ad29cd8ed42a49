#!/usr/bin/env bash
# The job that slurm.sh submits: runs the command once per GPU and requeues the job if it exits with 75, and only then.
#
#   launch/slurm_job.sh FOLDER COMMAND...
set -euo pipefail

launch=$1 code=0 # sbatch runs a copy of this script, so the path of the other scripts is an argument
shift
srun --kill-on-bad-exit=0 bash "$launch/worker.sh" gpu "$@" || code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID" || printf 'not requeued\n' >&2 # for example with Requeue=0, which is how to stop a run
fi
exit "$code"
