#!/bin/bash
# Builds the images heddle/coordinator, heddle/worker-cpu and, if asked for, heddle/worker-cuda with
# Docker or, where no engine runs, buildah.
# usage: docker/build.sh [coordinator|worker-cpu|worker-cuda]...   (default: the first two)
# Environment: HEDDLE_BASE (base image), HEDDLE_TAG (default latest), HEDDLE_ENGINE (docker|buildah).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

images=("$@")
[ $# -gt 0 ] || images=(coordinator worker-cpu)
tag=${HEDDLE_TAG:-latest}
base=()
[ -z "${HEDDLE_BASE:-}" ] || base=(--build-arg "BASE=$HEDDLE_BASE")

engine=${HEDDLE_ENGINE:-}
if [ -z "$engine" ]; then
  if docker version >/dev/null 2>&1; then engine=docker; else engine=buildah; fi
fi
command -v "$engine" >/dev/null || { echo "build: neither a Docker engine nor buildah" >&2; exit 1; }

case " ${images[*]} " in
  *" worker-cuda "*) docker/stage.sh --cuda ;;
  *) docker/stage.sh ;;
esac

for image in "${images[@]}"; do
  file=docker/images/$image/Dockerfile
  [ -f "$file" ] || { echo "build: no $file" >&2; exit 2; }
  case $engine in
    docker) docker build -q "${base[@]}" -t "heddle/$image:$tag" -f "$file" build/image ;;
    buildah)
      # The Docker format keeps HEALTHCHECK, which OCI images do not have.
      BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} \
        buildah build -q --format docker "${base[@]}" -t "heddle/$image:$tag" -f "$file" build/image
      ;;
  esac
  echo "build: heddle/$image:$tag"
done
