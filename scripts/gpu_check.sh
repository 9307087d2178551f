#!/usr/bin/env bash
# All that only a GPU can show, in under ten minutes: bash scripts/gpu_check.sh [OUT]
#
# The kernels by their tests, compiled instead of interpreted; whole networks against torch at every precision; the
# harness on the project's convolution beside cuDNN; and the tables for benchmarks/results, with the device's name, the
# versions and the commands. Every part runs whatever became of those before it; the exit code is 1 if any failed. Logs
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

device=$(python -c '
import platform, sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("no GPU here: torch.cuda.is_available() is false")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
      f"Python {platform.python_version()}")
') || exit 1
echo "$device"

benchmark=(python benchmarks/convolution.py --device cuda --batch-size 256)
part checkpoint 60 python scripts/fitted_resnet50.py "$out/resnet50.pth"
part kernels 120 python -m pytest tests/test_conv_kernels.py tests/test_conv_functional.py -p no:cacheprovider
part benchmark-bfloat16 150 "${benchmark[@]}" --dtype bfloat16
for dtype in bfloat16 float32 tf32 float16; do
    part "verify-$dtype" 60 python -m robust.verify --model resnet50 --weights "$out/resnet50.pth" --device cuda \
        --dtype "$dtype" --output "$out/verify-$dtype"
done
for conv in torch scratch; do
    part "evaluate-$conv" 60 python -m robust.evaluate --device cuda --conv "$conv" --output "$out/evaluate-$conv"
done
part compare 20 python -m robust.compare "$out/evaluate-torch" "$out/evaluate-scratch"
part verify-lite0 60 python -m robust.verify --device cuda --output "$out/verify-lite0"
part benchmark-tf32 120 "${benchmark[@]}" --tf32 --no-shapes

rm -f "$out/resnet50.pth"
{
    echo "# The convolution on a GPU"
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
} > "$out/convolution.md"
echo "Tables: $out/convolution.md, to be committed under benchmarks/results/ by the device's name."
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All passed in $SECONDS s."
