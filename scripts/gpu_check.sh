#!/usr/bin/env bash
# All that only a GPU can show, in under ten minutes: bash scripts/gpu_check.sh [OUT]
#
# First what is right or wrong, side by side, for most of it is compiling: the kernels by their tests, compiled instead
# of interpreted; the harness on the project's convolution beside cuDNN; whole networks against torch at every
# precision. Then what is timed, one after another: the tables for benchmarks/results, with the device's name, the
# versions and the commands. Every part runs whatever became of the others; the exit code is 1 if any failed. Logs and
# tables are in OUT (gpu-check by default). It needs what `pip install -e ".[dev]"` brings.
set -uo pipefail
cd "$(dirname "$0")/.."
device=$(python3 -c '
import platform, sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("no GPU here: torch.cuda.is_available() is false")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
      f"Python {platform.python_version()}")
') || exit 1
echo "$device"
out=${1:-gpu-check}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# part NAME SECONDS COMMAND...: stopped after so long. Its output goes to OUT/NAME.log, its end to the terminal.
part() {
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
    ((code == 0)) || echo "$name" >> "$out/failed"
    printf '\n== %s, %s s, exit code %s: %s\n%s\n' "$name" $((SECONDS - began)) $code "$*" "$(tail -n 40 "$out/$name.log")"
}

rm -f "$out/failed"
part kernels 240 python3 -m pytest -n 8 -p no:benchmark -p no:cacheprovider tests/test_conv_*.py &
(
    for conv in torch scratch; do
        part "evaluate-$conv" 90 python3 -m robust.evaluate --device cuda --conv "$conv" --output "$out/evaluate-$conv"
    done
    part compare 30 python3 -m robust.compare "$out/evaluate-torch" "$out/evaluate-scratch"
) &
part verify-lite0 120 python3 -m robust.verify --device cuda --output "$out/verify-lite0" &
part checkpoint 60 python3 scripts/fitted_resnet50.py "$out/resnet50.pth"
for dtype in bfloat16 float32 tf32 float16; do
    part "verify-$dtype" 150 python3 -m robust.verify --model resnet50 --weights "$out/resnet50.pth" --device cuda \
        --dtype "$dtype" --output "$out/verify-$dtype" &
done
wait

rm -f "$out/resnet50.pth"

# timed NAME SECONDS COMMAND...: a part whose output is a table.
timed() {
    part "$@"
    printf '\n`%s`:\n\n%s\n' "${*:3}" "$(cat "$out/$1.log")" >> "$out/gpu.md"
}

printf '# On a GPU\n\n%s.\n' "$device" > "$out/gpu.md"
benchmark=(python3 benchmarks/convolution.py --device cuda --batch-size 256)
timed network-bfloat16 150 "${benchmark[@]}" --dtype bfloat16 --no-shapes
timed shapes-bfloat16 90 "${benchmark[@]}" --dtype bfloat16 --no-whole
timed twin 60 python3 benchmarks/twin.py --device cuda
timed network-tf32 120 "${benchmark[@]}" --tf32 --no-shapes

echo
echo "Tables: $out/gpu.md, to be committed under benchmarks/results/ by the device's name."
if [[ -s $out/failed ]]; then
    echo "FAILED: $(paste -sd ' ' "$out/failed")"
    exit 1
fi
echo "All passed in $SECONDS s."
