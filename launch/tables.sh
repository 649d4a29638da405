#!/usr/bin/env bash
# launch/tables.sh NAME [--results DIR] [--commit HASH] [--print] measures every table of ep2, ep4 or ep8 (that many
# GPUs of one host), in-model (one GPU, then two) or tiny (two CPU ranks), each program under a time limit of its own.
# Rows go to DIR and its folders as they are measured (default: benchmarks/results); ./launch/do table renders them.
# --print: only the commands, with their limits in seconds. Exit status 1 if one failed or ran out of time.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
name=${1:-} results=benchmarks/results commit=() only_print='' failed=0
shift || usage
while (($#)); do
    case "$1" in
        --results) results=${2:?$1 needs a folder}; shift 2 ;;
        --commit) commit=(--commit "${2:?$1 needs a hash}"); shift 2 ;;
        --print) only_print=1; shift ;;
        *) usage ;;
    esac
done
[[ $results = /* ]] || results=$PWD/$results
cd "$here/.." || exit 1

# step SECONDS COMMAND...: what fails costs its own rows, not those of the steps after it.
step() {
    local limit=$1 begin=$SECONDS status=0
    shift
    echo "[tables] $limit s: $*"
    if [[ $only_print ]]; then return; fi
    # The launcher ends its ranks on the first signal; the second is for one that does not.
    timeout -k 40 "$limit" "$@" || status=$?
    echo "[tables] $((SECONDS - begin)) s, exit status $status"
    ((status == 0)) || failed=1
}
bench() {
    step "$1" launch/torchrun.sh "$ranks" benchmarks/bench.py --suite "${@:2}" --results "$results" "${commit[@]}"
}
replicas() {
    step "$1" launch/torchrun.sh "$ranks" benchmarks/replicas.py "${@:2}" --results "$results/replicas" "${commit[@]}"
}
scale() { step "$1" launch/scale.sh "$ranks" "${@:2}" --results "$results/scaling" "${commit[@]}"; }

case "$name" in
    ep2)
        ranks=2
        step 60 python3 -m megamoe compile
        for run in 1 2 3; do bench 90 ep2; done
        bench 150 ep2-more
        bench 180 ep2-rival
        replicas 60 --case flash64 --tokens 8,128,2048
        ;;
    ep4 | ep8)
        ranks=${name#ep}
        step 20 python3 -m megamoe compile
        bench 140 ep4
        scale 55 --case flash256 --tokens 2048
        replicas 35 --case flash256 --tokens 128,2048
        bench 45 ep4-rival
        ;;
    in-model)
        step 60 python3 -m megamoe compile
        step 90 python3 benchmarks/in_model.py --results "$results/in_model" "${commit[@]}"
        step 90 launch/torchrun.sh 2 benchmarks/in_model.py --results "$results/in_model" "${commit[@]}"
        step 240 launch/torchrun.sh 2 benchmarks/in_model.py --parts text --results "$results/in_model" "${commit[@]}"
        ;;
    tiny)
        ranks=2
        bench 60 tiny
        scale 60 --case tiny --tokens 4
        replicas 60 --case tiny --tokens 5 --redundant 4
        ;;
    *) usage ;;
esac
exit "$failed"
