#!/usr/bin/env bash
# GPUs under Slurm: one process a GPU, which find each other by themselves.
#
#   launch/slurm.sh --config FILE --name NAME [--nodes N] [--gpus-per-node N] [--time HH:MM:SS] [--port PORT] [--dry-run]
#                   [--sbatch FLAG]... [-- FLAG...]
#
# --nodes          default 1
# --gpus-per-node  default 8
# --time           of one job (default 24:00:00); two minutes before its end all save, leave with 75 and are queued again
# --port           where process 0 listens (default: JAX's own choice)
# --sbatch         passed on to sbatch, as often as needed, e.g. --sbatch --partition=h100
# --dry-run        print the command, run nothing
#
# What follows -- goes to the command, e.g. -- --train.only all. The folder must be the same on all nodes, and
# `python` there the one that has tli_jax: switch the environment on first.
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
