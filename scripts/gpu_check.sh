#!/usr/bin/env bash
# All that only a GPU can show, in under ten minutes: bash scripts/gpu_check.sh [OUT]
#
# The tables for benchmarks/results, with the device's name, the versions and the commands; the kernels by their tests,
# compiled instead of interpreted; the harness on the project's convolution beside cuDNN; whole networks against torch at
# every precision. Every part runs whatever became of those before it; the exit code is 1 if any failed. Logs
# and tables are in OUT (gpu-check by default). It needs what `pip install -e ".[dev]"` brings.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
budget=580 # seconds, for all parts
failed=()

# part NAME SECONDS COMMAND...: stopped after so long; its output goes to the terminal and to OUT/NAME.log.
part() {
    local name=$1 limit=$(($2 < budget - SECONDS ? $2 : budget - SECONDS)) began=$SECONDS
    shift 2
    echo "== $name: $*"
    if ((limit < 5)) || ! timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"; then failed+=("$name"); fi
    echo "== $name took $((SECONDS - began)) s"
}

device=$(python3 -c '
import platform, sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("no GPU here: torch.cuda.is_available() is false")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
      f"Python {platform.python_version()}")
') || exit 1
echo "$device"

benchmark=(python3 benchmarks/convolution.py --device cuda --batch-size 256)
twin=(python3 benchmarks/twin.py --device cuda)
part checkpoint 60 python3 scripts/fitted_resnet50.py "$out/resnet50.pth"
part benchmark-bfloat16 150 "${benchmark[@]}" --dtype bfloat16
part twin 60 "${twin[@]}"
part kernels 120 python3 -m pytest -n auto -p no:benchmark -p no:cacheprovider tests/test_conv_*.py
for conv in torch scratch; do
    part "evaluate-$conv" 60 python3 -m robust.evaluate --device cuda --conv "$conv" --output "$out/evaluate-$conv"
done
part compare 20 python3 -m robust.compare "$out/evaluate-torch" "$out/evaluate-scratch"
for dtype in bfloat16 float32 tf32 float16; do
    part "verify-$dtype" 60 python3 -m robust.verify --model resnet50 --weights "$out/resnet50.pth" --device cuda \
        --dtype "$dtype" --output "$out/verify-$dtype"
done
part verify-lite0 60 python3 -m robust.verify --device cuda --output "$out/verify-lite0"
part benchmark-tf32 90 "${benchmark[@]}" --tf32 --no-shapes

rm -f "$out/resnet50.pth"
{
    echo "# On a GPU"
    echo
    echo "$device."
    echo
    echo "\`${benchmark[*]} --dtype bfloat16\`:"
    echo
    cat "$out/benchmark-bfloat16.log"
    echo
    echo "\`${benchmark[*]} --tf32 --no-shapes\`:"
    echo
    cat "$out/benchmark-tf32.log"
    echo
    echo "\`${twin[*]}\`:"
    echo
    cat "$out/twin.log"
} > "$out/gpu.md"
echo "Tables: $out/gpu.md, to be committed under benchmarks/results/ by the device's name."
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All passed in $SECONDS s."
