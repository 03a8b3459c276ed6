#!/bin/sh
# What is in the image: /opt/venv/sbom.cdx.json, CycloneDX, of all Python packages. Runs while it is built.
set -eu
folder=$(mktemp -d)
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-cache-dir cyclonedx-bom==7.5.0
"$folder/bin/cyclonedx-py" environment /opt/venv --output-reproducible --output-format JSON \
    --output-file /opt/venv/sbom.cdx.json
rm -rf "$folder"
