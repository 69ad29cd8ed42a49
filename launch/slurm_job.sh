#!/usr/bin/env bash
# What slurm.sh hands to sbatch: the command on every GPU; queued again if it leaves with 75, and only then.
set -uo pipefail

# sbatch runs a copy of this script: the folder is the one that the job was sent from.
srun --kill-on-bad-exit=0 bash "${TLI_JAX_LAUNCH:-launch}/worker.sh" gpu "$@"
code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
