#!/bin/bash
# One conversion by many hosts that share a disk. Each task takes its share of the files; the
# last to be done makes the result appear. Submit it again after a failure: what is finished stays.
#
#     sbatch --nodes=8 examples/slurm_convert.sh /shared/llama /shared/llama-cut dp8mp4pp4
#
#SBATCH --job-name=jaxshard
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 SOURCE DESTINATION LAYOUT [OPTION…]" >&2
    exit 2
fi
source=$1 destination=$2 layout=$3
shift 3
# outside SLURM the tasks are made here, so that the script can be tried on one machine
if command -v srun >/dev/null && [ -n "${SLURM_JOB_ID:-}" ]; then
    exec srun jaxshard convert "$source" "$destination" --to "$layout" --process-index auto "$@"
fi
tasks=${TASKS:-2} pids=()
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_NTASKS=$tasks \
        jaxshard convert "$source" "$destination" --to "$layout" --process-index auto "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
