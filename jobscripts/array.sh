#!/bin/bash

# One run for each chip or sample, as an array. Each line of a file gives the parameters that differ between the runs:
#   image=chip_1_master.h5 output.directory=chip_1
# All other parameters follow it:
#   sbatch --array=1-12%4 array.sh runs.txt space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90

#SBATCH --exclusive
#SBATCH --output=%x_%A_%a.log
#SBATCH --open-mode=append
# the script is told 120 s before the time is over, and asks the ranks to come to an end
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue

# ==== site settings: adapt these ====
#SBATCH --job-name=ssx_mpi
#SBATCH --nodes=1
#SBATCH --time=01:00:00
##SBATCH --partition=
##SBATCH --account=
##SBATCH --qos=
##SBATCH --constraint=
#SBATCH --array=1-1
# ranks on each node; empty for one on each core
RANKS_PER_NODE=${RANKS_PER_NODE:-}
# how ranks are started: srun, with the --mpi= that this MPI needs where it is not the default, or mpirun
LAUNCHER=${LAUNCHER:-srun}
SRUN_MPI=${SRUN_MPI:-}
# how the program gets onto the PATH
# type module >/dev/null 2>&1 || . /etc/profile; module load ssx_mpi
# ==== end of site settings ====

# a word of the end that comes before there are ranks to ask
stopping= cancelled=
trap 'stopping=yes' USR1
trap 'stopping=yes cancelled=yes' TERM
# one thread to a rank, and no locks on files that are only read, which some parallel file systems do not have
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1
export HDF5_USE_FILE_LOCKING=FALSE
# the program stops ahead of the end of the job; older versions of Slurm do not say when that is
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) || SLURM_JOB_END_TIME=
    export SLURM_JOB_END_TIME
fi
RANKS=$((SLURM_JOB_NUM_NODES * ${RANKS_PER_NODE:-$SLURM_CPUS_ON_NODE}))
command -v ssx_mpi >/dev/null || { echo "ssx_mpi is not on the PATH: see the site settings"; exit 2; }

# Ranks end with 0 or 3 (done, with or without crystals), 2 or 4 (someone must look), or 75 (stopped with work left).
# Any other code is that of a crash: what is finished stays finished, so the program is started again; the image that
# took it down twice is set aside.
# restart=True is for the first start alone
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || export SSX_MPI_GO_ON=yes
ask_ranks_to_stop() {
    stopping=yes
    kill -USR2 "${step:-}" 2>/dev/null
}
trap ask_ranks_to_stop USR1
# Slurm lets the other ranks wait for one that was killed; they get 20 s, and those of an orderly end need less
on_all_ranks() {
    status=75
    [ -z "$stopping" ] || return
    for attempt in 1 2 3; do
        case $LAUNCHER in
            srun)
                srun ${SRUN_MPI:+--mpi=$SRUN_MPI} --ntasks="$RANKS" --cpu-bind=cores --wait=20 "$@" &
                ;;
            *) ssx_mpi.launch mpirun -n "$RANKS" --bind-to core "$@" & ;;
        esac
        step=$!
        while kill -0 "$step" 2>/dev/null; do
            wait "$step"
            status=$?
        done
        case $status in 0 | 2 | 3 | 4 | 75) return ;; esac
        echo "Attempt $attempt ended with exit code $status"
        # asked to stop before they could listen
        [ -z "$stopping" ] || { status=75; return; }
        export SSX_MPI_GO_ON=yes
    done
}

set -- "$@"
runs=$1
shift
# empty lines do not count, nor what Windows puts at the end of one
read -r -a own <<<"$(tr -d '\r' <"$runs" | grep '[^[:space:]]' | sed -n "${SLURM_ARRAY_TASK_ID}p")"
[ ${#own[@]} -gt 0 ] || { echo "$runs has no line $SLURM_ARRAY_TASK_ID"; exit 2; }
on_all_ranks ssx_mpi "${own[@]}" "$@"
exit $status
