#!/bin/bash
# Convert with many hosts and a shared filesystem. Each task writes its share of the files, and the
# last one publishes the result. After a failure submit it again: finished files are kept.
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
# outside SLURM, start the tasks here, so that the script can be tested on one machine
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
