# Sourced by scripts/demo and scripts/test: makes .venv beside pyproject.toml once, and puts its programs on the PATH.
# usage: extras=... (empty, or "dev"), then . scripts/environment.sh; goes to that folder from $caller.

set -eu
caller="$(pwd)"
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
    echo "Python 3.10 or later is needed (found: $("$python" --version 2>&1 || echo none)); set PYTHON to one." >&2
    exit 2
}

# What is installed is written down with what it was installed from; a second run finds the same and does nothing.
wanted="extras=$extras $(cksum < pyproject.toml) $(pwd)"
if [ ! -x .venv/bin/fa-stereo ] || ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
    # Where the system lacks python3-venv, making a .venv fails half way: nothing is in it then, pip least of all.
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        if [ -n "$(ls .venv/lib/python*/site-packages 2>/dev/null)" ]; then
            echo ".venv has packages but no pip: remove the folder, or install pip in it" >&2
            exit 2
        fi
        rm -rf .venv
        "$python" -m venv .venv || {
            echo "$python cannot make a virtual environment: install its venv module (Debian, Ubuntu: python3-venv)" >&2
            exit 2
        }
    fi
    echo "Installing into .venv (PyTorch is large: a few minutes the first time) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" || {
        free() { df -Ph "$1" | awk 'NR == 2 { print $4 }'; }
        echo "The installation did not end: the reason is above. With CUDA's PyTorch it takes 6 GB in $(pwd)" \
            "($(free .) free) and up to 3 GB for a while in ${TMPDIR:-/tmp} ($(free "${TMPDIR:-/tmp}") free)." \
            "Mend that and call $0 again." >&2
        exit 2
    }
    # An install with the extras serves without them too.
    { [ -z "$extras" ] || echo "extras= $(cksum < pyproject.toml) $(pwd)"; echo "$wanted"; } > .venv/installed
fi
PATH="$(pwd)/.venv/bin:$PATH"
export PATH
