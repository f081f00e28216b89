#!/bin/bash
# Collects what the images need from a finished build into build/image/: the binaries, LibTorch, and
# the names of the Debian packages that carry the libraries they load.
# usage: docker/stage.sh [--cuda]
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

readonly TORCH=${HEDDLE_DEPS:-$HOME/.cache/heddle}/libtorch-2.11.0
readonly OUT=build/image
readonly BINARIES=(heddle heddle-coordinator heddle-worker heddle-shim heddle-trainer heddle-model
  heddle-mpi-server)

die() { printf 'stage: %s\n' "$*" >&2; exit 1; }

if [ "${1:-}" = --cuda ]; then
  grep -qx cuda "$TORCH/stamp" || die "LibTorch's CUDA half is missing: ./dev setup --cuda"
  [ -f build/bin/libheddle_cuda.so ] ||
    die "the CUDA plug-in is missing: ./dev configure -DHEDDLE_WITH_CUDA=ON && ./dev build"
fi
for binary in "${BINARIES[@]}"; do
  [ -x "build/bin/$binary" ] || die "build/bin/$binary is missing: ./dev build"
done

# Packages that own the libraries of these binaries, LibTorch's own left out.
packages_of() {
  local library
  ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | while read -r library; do
    case $library in
      "$TORCH"/*) continue ;;
    esac
    # dpkg knows a library under /usr/lib or, as installed before the merge of /usr, under /lib.
    dpkg -S "$(readlink -f "$library")" 2>/dev/null || dpkg -S "${library#/usr}" 2>/dev/null ||
      dpkg -S "/usr$library" 2>/dev/null || die "no Debian package owns $library"
  done | sed 's/:.*//' | sort -u
}

rm -rf "$OUT"
mkdir -p "$OUT/bin" "$OUT/torch"
for binary in "${BINARIES[@]}"; do
  cp "build/bin/$binary" "$OUT/bin/"
  strip --strip-unneeded "$OUT/bin/$binary"
done
cp build/bin/libheddle_mpi.so "$OUT/bin/"
if [ "${1:-}" = --cuda ]; then
  cp build/bin/libheddle_cuda.so "$OUT/bin/"
fi
packages_of build/bin/heddle build/bin/heddle-coordinator > "$OUT/packages-coordinator"
packages_of build/bin/heddle-worker build/bin/heddle-trainer build/bin/heddle-model \
  build/bin/heddle-mpi-server build/bin/libheddle_mpi.so > "$OUT/packages-worker"
# The same layout as unpacked, because LibTorch finds its stubs relative to itself. No headers.
mkdir -p "$OUT/torch/torch"
cp -a "$TORCH/torch/lib" "$OUT/torch/torch/"
cp -a "$TORCH/nvidia" "$OUT/torch/"
if [ "${1:-}" != --cuda ]; then
  # Only what the loader wants: a CUDA set-up on this machine must not inflate the CPU image.
  find "$OUT/torch/torch/lib" -type f ! -name 'libtorch_cpu.so' ! -name 'libc10.so' \
    ! -name 'libgomp*' ! -name 'libshm.so' -delete
  find "$OUT/torch/nvidia" -type f ! -name 'libcupti.so.*' ! -name 'libcudart.so.*' -delete
fi
find "$OUT" -type d -empty -delete
du -sh "$OUT" | cut -f1 | xargs printf 'stage: %s in build/image\n'
