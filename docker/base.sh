#!/bin/sh
# Make a Python base image from Debian's packages, where no registry is at hand: docker/base.sh [NAME]
#
# Needs mmdebstrap and podman (or docker). Then: BASE_IMAGE=localhost/python:bookworm docker/build.sh
# MIRROR   the Debian mirror (default: the one that this machine uses)
set -eu
name=${1:-localhost/python:bookworm}
tool=podman
command -v podman >/dev/null || tool=docker
if $tool image inspect "$name" >/dev/null 2>&1; then
    echo "docker/base.sh: $name is there; remove it ($tool rmi $name) to make it anew"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip \
    bookworm "$folder/root.tar" ${MIRROR:-}
$tool import "$folder/root.tar" "$name"
