#!/usr/bin/env bash
# launch/scale.sh MAX_RANKS [arguments of benchmarks/scaling.py] measures 1, 2, 4, ... MAX_RANKS ranks, each number in a
# start of its own, with mpirun where there is mpi4py for it and else with torchrun. Add --results to keep the rows;
# `python3 benchmarks/scaling.py --report` then shows all sizes together.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# < 1)); then sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
most=$1
shift
if [[ ! $most =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/scale.sh: MAX_RANKS '$most' must be a number of at least 1" >&2
    exit 2
fi
launcher=$here/torchrun.sh
if command -v mpirun >/dev/null && python3 -c 'import mpi4py.MPI' 2>/dev/null; then launcher=$here/mpirun.sh; fi
size=1
while true; do
    echo "[scale] $size rank(s) with $(basename "$launcher")"
    "$launcher" "$size" "$here/../benchmarks/scaling.py" --sizes "$size" "$@"
    ((size < most)) || break
    size=$((size * 2 < most ? size * 2 : most))
done
