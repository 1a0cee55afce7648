#!/usr/bin/env bash
# i-PI moves the atoms and writes down how far a committee of 8 spreads: 500 steps of CuAu(H2O)2. Output goes to the folder given, or to ./out.
# Further arguments go to tumbaga serve, for example --no-learn. Either program may be started first.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out}
mkdir -p "$out"
cp "$here/input.xml" "$here/init.xyz" "$out/"
cd "$out"
rm -f EXIT
tumbaga serve -m painn:cuau-water -t "$here/init.xyz" -u -a cuau-committee --committee 8 --quiet --run-dir run "${@:2}" &
server=$!
trap 'kill $server; wait $server' EXIT
i-pi input.xml > i-pi.log
echo "i-PI's last line: $(tail -1 md.out)"
echo "standard deviation of the energy, Hartree: $(tail -1 md.uncertainty_0)"
echo "steps above the threshold: $(grep -o position md.uncertain | wc -l)"
