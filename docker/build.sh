#!/bin/sh
# Build the image: docker/build.sh [cpu|gpu] [further build options]
#
# BUILDER       docker or buildah (default: whichever is there, docker first)
# IMAGE         name of the image (default: untaxed), tagged with the target
# BASE_IMAGE    a Python base image, for builds without a registry
# Further options go to the builder as they are, such as --build-arg TORCH_INDEX_URL=...
# With buildah a build is told what pip is told on this machine: mirrors, folders of wheels, certificate.
set -eu
cd "$(dirname "$0")/.."
target=cpu
case "${1:-}" in
cpu | gpu)
    target=$1
    shift
    ;;
"" | -*) ;;
*)
    echo "docker/build.sh: unknown target $1; wanted cpu or gpu" >&2
    exit 64
    ;;
esac
if [ -z "${BUILDER:-}" ]; then
    if docker info >/dev/null 2>&1; then BUILDER=docker; else BUILDER=buildah; fi
fi
case "$BUILDER" in
docker) command="docker build" ;;
buildah)
    pip=$(mktemp)
    trap 'rm -f "$pip"' EXIT
    command="buildah build --layers --isolation chroot --format oci $(python3 docker/pip_here.py "$pip" | tr '\n' ' ')"
    ;;
*)
    echo "docker/build.sh: unknown BUILDER $BUILDER; wanted docker or buildah" >&2
    exit 64
    ;;
esac
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' pipeline/__init__.py)
revision=$(git rev-parse --verify --quiet HEAD || echo unknown)
if [ "$revision" != unknown ]; then
    # shellcheck disable=SC2046  # names of files and folders, one a line
    changed=$(git status --porcelain --untracked-files=no -- $(sed -n 's/^!//p' .dockerignore) \
        .dockerignore docker/Dockerfile)
    revision=$revision${changed:+-dirty}
fi
# shellcheck disable=SC2086  # the builder's name and its subcommand are two words
$command --file docker/Dockerfile --target "$target" --tag "${IMAGE:-untaxed}:$target" \
    --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    ${BASE_IMAGE:+--build-arg BASE_IMAGE="$BASE_IMAGE"} "$@" .
