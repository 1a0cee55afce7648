#!/usr/bin/env bash
# i-PI moves the atoms, tumbaga serves the forces and learns: 1000 steps of CuAu(H2O)2. Output goes to the folder given, or to ./out.
# Further arguments go to tumbaga serve, for example --no-learn. Either program may be started first.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out}
mkdir -p "$out"
cp "$here/input.xml" "$here/init.xyz" "$out/"
cd "$out"
rm -f EXIT
tumbaga serve -m painn:cuau-water -t "$here/init.xyz" -u -a cuau --quiet --run-dir run "${@:2}" &
server=$!
trap 'kill $server; wait $server' EXIT
i-pi input.xml > i-pi.log
echo "i-PI's last line: $(tail -1 md.out)"
