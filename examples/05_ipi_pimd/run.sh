#!/usr/bin/env bash
# Path-integral MD of CuAu(H2O)2 by i-PI, forces by tumbaga, all beads of a step in one message:
#
#     bash run.sh [BEADS [OUT [ARGUMENTS OF tumbaga serve ...]]]        8 beads, in out-8, as they stand
#
# STEPS=1000 in the environment makes it longer or shorter. Either program may be started first.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
beads=${1:-8}
out=${2:-out-$beads}
mkdir -p "$out"
cp "$here/init.xyz" "$out/"
sed -e "s/<!ENTITY beads .*/<!ENTITY beads \"$beads\">/" -e "s/<!ENTITY steps .*/<!ENTITY steps \"${STEPS:-400}\">/" "$here/input.xml" > "$out/input.xml"
cd "$out"
rm -f EXIT
tumbaga serve -m painn:cuau-water -t init.xyz -u -a cuau-pimd --quiet --run-dir run "${@:3}" &
server=$!
trap 'kill $server; wait $server' EXIT
i-pi input.xml > i-pi.log
echo "i-PI's last line: $(tail -1 md.out)"
