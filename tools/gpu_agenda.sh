#!/usr/bin/env bash
# What is to be found out on a GPU, in stages of under 9 minutes each, the first ones first:
#
#     tools/gpu_agenda.sh STAGE [--cpu-rehearsal]
#
#   bits          every kernel on the device against the CPU's, a shard of 2^31 + 4096 elements included
#   kernels       the kernels timed by events beside a copy of the same bytes, and whole steps
#   step          1.3B, 13B, 30B within 80 GB: MeZO beside bare forwards, AdamW, and MeZO as published
#   conformance   runs on the device that the CPU rebuilds bit for bit, plain and over FSDP2
#   large         66B on a device of 141 GB
#
# Works from a bare checkout with torch, triton, transformers and numba; wheels of what else is missing may lie in wheels/.
# What a stage finds is one archive, $OUT/STAGE.tar.gz. A rehearsal takes the same path on a CPU, small, and measures
# nothing.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
stage=${1:-}; [[ ${2:-} == --cpu-rehearsal || $# -eq 1 ]] || usage
rehearsal=${2:+1}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
: "${OUT:=build/gpu_agenda}"; mkdir -p "$OUT"; OUT=$(realpath "$OUT")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD:$work/site HF_HUB_OFFLINE=1
found=$work/$stage; mkdir "$found"

if [[ -d wheels ]] && ! "$python" -c "import pydantic, yaml, typer" 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" wheels/*.whl
fi
run() { echo "\$ $*" | tee -a "$found/log.txt"; timeout 530 "$@" 2>&1 | tee -a "$found/log.txt"; }
small=(); device=(); [[ -z $rehearsal ]] || { small=(models=random:opt-125m rows=1 tokens=8 rounds=1 memory_cap_gib=null); device=(--device cpu); }

case $stage in
    bits)
        if [[ $rehearsal ]]; then TRITON_INTERPRET=1 run "$python" -W ignore -m tools.gpu_bits "${device[@]}"
        else run "$python" -m tools.gpu_bits --large; fi ;;
    kernels)
        if [[ $rehearsal ]]; then run "$python" -m tools.kernel_bench --device cpu --only kernels --rounds 1 --out "$found"
        else run "$python" -m tools.kernel_bench --rounds 15 --out "$found"; fi ;;
    step) run "$python" -m mezo_scale bench one-gpu --out "$found" budget_s=500 "${small[@]}" ;;
    conformance) run "$python" -m tools.gpu_conformance "${device[@]}" ;;
    large)
        [[ $rehearsal ]] || small=(models=random:opt-66b memory_cap_gib=null)
        run "$python" -m mezo_scale bench one-gpu --out "$found" budget_s=500 strategies=single methods=mezo "${small[@]}" ;;
    *) usage ;;
esac && code=0 || code=$?
tar -czf "$OUT/$stage.tar.gz" -C "$work" "$stage"
echo "$OUT/$stage.tar.gz"
exit "$code"
