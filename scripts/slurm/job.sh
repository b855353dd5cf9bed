# shellcheck shell=bash
# What the templates beside this file share: caches on each machine's own disk, and a job that saves before it must go.

# Edit: a fast disk of each machine, for what can be built again (row indexes, compiled kernels).
LOCAL=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/llmga-${USER:-$UID}
export LLMGA_CACHE_DIR=$LOCAL/llmga TRITON_CACHE_DIR=$LOCAL/triton TORCHINDUCTOR_CACHE_DIR=$LOCAL/inductor

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it over from the job (Slurm 22.05 and later)

# Runs a command as a job step and exits as it does. USR1 (from --signal=B:USR1@...) stops the step's tasks with SIGTERM,
# upon which they save, and then requeues the job. SIGTERM (from a preemption or from scancel) stops them likewise and
# leaves it to Slurm whether the job comes back: --requeue brings a preempted one back, and a cancelled one is gone.
run_until_signal() {
    local code step
    requeue=""
    trap 'requeue=yes; heard=yes; stop_tasks' USR1
    trap 'heard=yes; stop_tasks' TERM
    "$@" & # in the background: bash hears a signal only between commands, or while it waits
    step=$!
    heard=yes
    while [ -n "$heard" ]; do # a signal ends the waiting, not the step
        heard=""
        code=0
        wait "$step" || code=$?
    done
    if [ -n "$requeue" ] && [ "$code" -ne 0 ]; then
        echo "stopped in time; back into the queue: scontrol requeue $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$code"
}

# Without --full or --batch, scancel reaches the tasks of all steps and not this script.
stop_tasks() {
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}
