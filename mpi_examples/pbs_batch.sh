#!/bin/bash
# A corpus job on PBS that submits itself again after its walltime, until every record is done:
#
#     qsub -v MODEL=path/to/model,INPUT=prompts.jsonl,DIR=out,OPTIONS="--max-tokens 512" mpi_examples/pbs_batch.sh
#
# INPUT may be a pattern. Set TP for the ranks of one replica. Where compute nodes may not submit jobs, submit a chain
# instead, each job with `-W depend=afternotok:PREVIOUS`: the same command goes on where the one before stopped.
#PBS -N cutp-batch
#PBS -l select=2:ncpus=64:mpiprocs=4:ngpus=4
#PBS -l walltime=12:00:00
#PBS -j oe
set -u
cd "$PBS_O_WORKDIR" || exit 2
: "${MODEL:?}" "${INPUT:?}" "${DIR:?}"
script=${SCRIPT:-mpi_examples/pbs_batch.sh}
starts=${STARTS:-1}

# PBS kills ten seconds after its warning, so the time limit does the work.
# shellcheck disable=SC2086  # OPTIONS are several words
mpiexec cutp batch "$MODEL" "$INPUT" -o "$DIR" --tp "${TP:-4}" --time-limit auto --margin 4m ${OPTIONS:-}
status=$?

# 75: stopped early, nothing is lost. A job that never gets anywhere must not start forever.
if [ "$status" -eq 75 ] && [ "$starts" -lt "${MAX_STARTS:-50}" ]; then
    export MODEL INPUT DIR OPTIONS="${OPTIONS:-}" TP="${TP:-4}" SCRIPT="$script" STARTS=$((starts + 1))
    qsub -v MODEL,INPUT,DIR,OPTIONS,TP,SCRIPT,STARTS "$script"
elif [ "$status" -eq 0 ] || [ "$status" -eq 6 ]; then
    cutp batch merge "$DIR" -o "$DIR/results.jsonl" --order input
fi
exit "$status"
