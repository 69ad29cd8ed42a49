#!/usr/bin/env bash
# Submits a run to Slurm, with one process per GPU. The processes find each other by themselves.
#
#   launch/slurm.sh --config FILE --name NAME [--nodes N] [--gpus-per-node N] [--time HH:MM:SS] [--port PORT] [--dry-run]
#                   [--sbatch FLAG]... [-- FLAG...]
#
# --nodes          number of nodes (default: 1)
# --gpus-per-node  default: 8
# --time           time limit of a job (default: 24:00:00); two minutes before it, all processes save and the job requeues
# --port           port on which process 0 listens (default: chosen by JAX)
# --sbatch         flag for sbatch; can be repeated, e.g. --sbatch --partition=h100
# --dry-run        print the command without running it
#
# Arguments after -- are passed to the command, e.g. -- --train.only all. Run it from a folder that all nodes share, in
# an activated environment that contains tli_jax.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

config='' name='' nodes=1 gpus_per_node=8 time=24:00:00 port='' sbatch=()
read_options "config name nodes gpus_per_node time port sbatch" "$@"
need --config "$config"
need --name "$name"
check_name "$name"
check_number --nodes "$nodes"
check_number --gpus-per-node "$gpus_per_node"
[[ -z $port ]] || check_number --port "$port"
make_command "$config"
words=("--job-name=$name" "--output=$name-%j.log" --open-mode=append "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node")
words+=("--gpus-per-node=$gpus_per_node" "--time=$time" --signal=TERM@120 --requeue)
[[ -z $port ]] || words+=("--export=ALL,JAX_COORDINATOR_PORT=$port")
run sbatch "${words[@]}" "${sbatch[@]}" "$LAUNCH/slurm_job.sh" "$LAUNCH" "${COMMAND[@]}"
