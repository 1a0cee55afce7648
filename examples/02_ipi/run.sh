#!/usr/bin/env bash
# i-PI moves the atoms, tumbaga serves the forces and learns: 1000 steps of CuAu(H2O)2.
# Start it in this folder; either of the two may be started first.
set -euo pipefail
cd "$(dirname "$0")"
rm -f EXIT
tumbaga serve -m painn:cuau-water -t cluster.xyz -u -a cuau --quiet --run-dir run "$@" &
server=$!
trap 'kill $server; wait $server' EXIT
i-pi input.xml > i-pi.log
tail -1 md.out
