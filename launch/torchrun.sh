#!/usr/bin/env bash
# One host: launch/torchrun.sh NUM_RANKS SCRIPT|-m MODULE [arguments]. One process a rank, on the GPU of its LOCAL_RANK.
# Several hosts: run torchrun itself with --nnodes, --node-rank and --rdzv-endpoint, or use launch/mpirun.sh.
set -euo pipefail
if (($# < 2)); then sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
ranks=$1
shift
if [[ ! $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/torchrun.sh: NUM_RANKS '$ranks' must be a number of at least 1" >&2
    exit 2
fi
# Ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python3 -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
