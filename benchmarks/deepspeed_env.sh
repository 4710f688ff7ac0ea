#!/bin/sh
# Make a virtual environment with DeepSpeed for the CPU, a peer to measure against and no dependency.
#
#     benchmarks/deepspeed_env.sh DIR [deepspeed==0.19.8]
#     python benchmarks/overlap.py --deepspeed DIR/bin/python
#
# It has the versions of torch and transformers that the Python on the PATH has (PYTHON=... for another),
# so that the peers differ in nothing else. DeepSpeed's own kernels are not built: the optimizer of
# `overlap.py` is torch's. Takes a few minutes and about 1.5 GB with the CPU build of torch.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 DIR [REQUIREMENT]" >&2
    exit 2
fi
dir=$1
deepspeed=${2:-deepspeed}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

version() {
    "$python" -c "from importlib.metadata import version; print(version('$1').partition('+')[0])"
}
torch=$(version torch)
transformers=$(version transformers)
numpy=$(version numpy)

"$python" -m venv --clear "$dir"
"$dir/bin/python" -m pip install -q "setuptools<81" wheel "torch==$torch" "transformers==$transformers" \
    "numpy==$numpy" hjson msgpack psutil py-cpuinfo einops ninja tqdm
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$dir/bin/python" -m pip install -q --no-build-isolation "$deepspeed"
DS_ACCELERATOR=cpu "$dir/bin/python" -c '
import deepspeed, torch
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")' | tail -n 1
