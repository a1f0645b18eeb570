#!/usr/bin/env bash
# create_venv.sh FOLDER cpu|cuda [PYTHON]: an empty virtual environment on a Python from 3.10 to 3.14.
set -euo pipefail
folder=$1 device=$2 asked=${3:-}

suits() {
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

python=""
for candidate in ${asked:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}; do
  if suits "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
  found=$(command -v "${asked:-python3}" >/dev/null && "${asked:-python3}" --version 2>&1 | head -n 1 || true)
  echo "lumrec needs Python 3.10 to 3.14; ${asked:-python3} is: ${found:-not found}." \
    "Install one, or name it: make setup PYTHON=/path/to/python3" >&2
  exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  echo "$python has no venv module; on Debian and Ubuntu it comes with: apt install python3-venv" >&2
  exit 1
fi

# Both builds of fbgemm unpack into one folder, so one is never installed over the other.
if [ -e "$folder/device" ] && [ "$(cat "$folder/device")" != "$device" ]; then
  echo "setup: $folder holds the $(cat "$folder/device") build; replacing it by that for $device"
  rm -rf "$folder"
fi
echo "setup: $("$python" --version), $device build, into $folder (some minutes the first time)"
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
echo "$device" >"$folder/device"
