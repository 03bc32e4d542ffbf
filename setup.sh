#!/usr/bin/env bash
# Makes .venv with the pinned packages, then lets data/fetch.py place the data and the weights.
# Exit codes: 0 ready, even if files are missing for want of a network; 1 a step failed; 2 usage.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash setup.sh [--dev] [--assets-from DIR] [--help]

Makes .venv with the packages of requirements.txt, then fetches the data and the weights.
Run it again at any time: what is there already is left alone.

  --dev              install requirements-dev.txt: also what the tests and the linter need
  --assets-from DIR  copy data and weights from DIR (e.g. ../shared) instead of downloading them
  --help             show this

PYTHON=/path/to/python3.12 bash setup.sh uses that Python (3.10 to 3.13) for a new .venv.
pip reads its own settings: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels installs offline.
END
}

stop() { # stop CODE MESSAGE
    echo "setup.sh: error: $2" >&2
    exit "$1"
}

absolute() { # a path as the caller wrote it, made independent of the current folder
    case $1 in
        /*) echo "$1" ;;
        *) echo "$PWD/$1" ;;
    esac
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() { # by running each: a name on PATH may be a stub that starts nothing
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop 2 "no Python 3.10 to 3.13 found; install one, or name it in PYTHON (see --help)"
}

make_venv() { # or keeps the one that is there: only a .venv that nothing can run is cleared
    if [ -f .venv/pyvenv.cfg ] && .venv/bin/python -c '' >/dev/null 2>&1; then
        is_supported .venv/bin/python ||
            stop 2 ".venv has a Python other than 3.10 to 3.13; rm -r .venv and run again"
        .venv/bin/python -m pip --version >/dev/null 2>&1 ||
            .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
            stop 1 ".venv has no pip; rm -r .venv and run again"
        return
    fi
    if [ -L .venv ] || { [ -e .venv ] && [ ! -f .venv/pyvenv.cfg ]; }; then
        stop 2 "$PWD/.venv is no virtual environment of this script; move it away and run again"
    fi
    if [ -e .venv ]; then
        echo "making .venv anew: its Python is gone"
    else
        echo "making .venv"
    fi
    "$python" -m venv --clear .venv >/dev/null ||
        stop 1 "$python could not make .venv (Debian and Ubuntu: apt install python3-venv)"
}

requirements=requirements.txt
assets=
while [ $# -gt 0 ]; do
    case $1 in
        --dev) requirements=requirements-dev.txt ;;
        --assets-from)
            [ $# -ge 2 ] || stop 2 "--assets-from needs a folder (see --help)"
            assets=$2
            [ -d "$assets" ] || stop 2 "--assets-from: $assets: no such folder"
            assets=$(absolute "$assets")
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) stop 2 "unknown option $1 (see --help)" ;;
    esac
    shift
done

if [ -n "${PYTHON:-}" ]; then
    is_supported "$PYTHON" || stop 2 "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
    python=$(absolute "$(command -v "$PYTHON")")
else
    python=$(find_python)
fi

unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

make_venv
echo "installing $requirements into .venv (the first time takes minutes)"
.venv/bin/python -m pip install -qq --disable-pip-version-check -r "$requirements" ||
    stop 1 "pip could not install $requirements; without a network, give it a folder of wheels:
  PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels bash setup.sh"

if [ ! -f data/fetch.py ] || [ ! -f data/manifest.json ]; then
    echo "no data/fetch.py or data/manifest.json here: data and weights are not fetched"
    exit 0
fi
status=0
if [ -n "$assets" ]; then
    .venv/bin/python data/fetch.py --assets-from "$assets" || status=$?
else
    .venv/bin/python data/fetch.py || status=$?
fi
if [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
    exit "$status"
fi

if [ -s stories42M.pt ]; then
    echo "ready; next: .venv/bin/python sanity_check.py"
else
    echo "ready, but without stories42M.pt; next: .venv/bin/python run_llama.py --help"
fi
