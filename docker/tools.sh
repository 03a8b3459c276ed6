#!/bin/sh
# Install what builds and runs containers without a daemon, on Debian or Ubuntu, as root: docker/tools.sh
# For the tests of the cluster in miniature: PostgreSQL too.
set -eu
wanted="buildah podman runc conmon netavark aardvark-dns iptables catatonit uidmap mmdebstrap postgresql"
missing=""
for one in $wanted; do
    dpkg-query --show --showformat '${Status}' "$one" 2>/dev/null | grep -q "install ok installed" || missing="$missing $one"
done
[ -z "$missing" ] && exit 0
apt-get update --quiet
# shellcheck disable=SC2086  # a word each
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $missing
