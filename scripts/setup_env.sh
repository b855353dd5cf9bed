#!/usr/bin/env bash
# Makes .venv with the pinned packages of constraints.txt and this package in it. `make` calls it before everything;
# a second call returns at once. PYTHON=/path/to/python picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

NEED_MINOR=11
NEED_GB=8
STAMP=.venv/.installed
INPUTS=(constraints.txt setup.py)

fail() {
    printf '\nsetup: %s\n' "$1" >&2
    exit 1
}

fingerprint() {
    pwd
    cat "${INPUTS[@]}" | cksum
}

is_ready() { [ -x .venv/bin/python ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; }

# Prints the first interpreter that is new enough and can make virtual environments.
find_python() {
    local candidate version venv_missing=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found_version=$version
        [ "${version%%.*}" -eq 3 ] && [ "${version#*.}" -ge "$NEED_MINOR" ] || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        venv_missing=${venv_missing:-$version}
    done
    if [ -n "$venv_missing" ]; then
        fail "Python $venv_missing cannot make virtual environments; install python$venv_missing-venv (Debian: apt install python3-venv) and run this again."
    fi
    fail "Python 3.$NEED_MINOR or newer is needed, found ${found_version:-none}; install it (Debian 12 or newer: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3"
}

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    [ "$free_gb" -ge "$NEED_GB" ] ||
        fail "the disk of $(pwd) has $free_gb GB free, the packages need $NEED_GB GB (most of it PyTorch); free some space or clone onto another disk."
}

is_ready && exit 0
if command -v flock >/dev/null; then # two makes at once: the second waits for the first
    exec 9<.
    flock 9
    is_ready && exit 0
fi

if [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" != "$(pwd)" ]; then
    echo "setup: .venv was made in $(head -n 1 "$STAMP"); making it again here"
    rm -rf .venv
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    check_disk
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
elif ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    check_disk
fi
echo "setup: installing the packages pinned in constraints.txt (5 GB, two to five minutes the first time)"
PYTHONWARNINGS=ignore .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]' |
    awk '/^ *(Downloading|Building|Installing|Successfully)/ {print substr($0, 1, 110); fflush()}' ||
    fail "pip could not install the packages; its message is above. Run this again to go on from there."
fingerprint >"$STAMP"
echo "setup: ready"
