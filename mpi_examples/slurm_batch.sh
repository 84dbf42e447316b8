#!/bin/bash
# A corpus job on Slurm that goes on after its walltime, a preemption or a failed node, until every record is done:
#
#     sbatch mpi_examples/slurm_batch.sh path/to/model out prompts.jsonl --max-tokens 512
#
# Arguments: the model, the directory of the job, and what else `cutp batch` takes. Set TP for the ranks of one replica.
#SBATCH --job-name=cutp-batch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
# All ranks get SIGUSR1 five minutes (Slurm: up to six) before the end; `B:` before it would reach this shell only.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cutp-batch-%j.log
set -u
if [ $# -lt 3 ]; then
    echo "usage: sbatch slurm_batch.sh MODEL DIR INPUT... [options of cutp batch]" >&2
    exit 2
fi
model=$1
directory=$2
shift 2

# The signal above and --time-limit do the same; the latter also works where the signal does not get through.
srun --mpi="${MPI_TYPE:-pmix}" cutp batch "$model" "$@" -o "$directory" --tp "${TP:-4}" --time-limit auto --margin 4m
status=$?

# 75: stopped early, nothing is lost. A job that never gets anywhere must not start forever.
if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-50}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -eq 0 ] || [ "$status" -eq 6 ]; then
    cutp batch merge "$directory" -o "$directory/results.jsonl" --order input
fi
exit "$status"
