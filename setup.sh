#!/usr/bin/env bash
# Make .venv with the pinned packages, then let data/fetch.py place the data and the weights.
# Exit codes: 0 ready, even if files are missing because there was no network; 1 a step failed; 2 usage.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash setup.sh [--dev] [--assets-from DIR] [--help]

Make .venv with the packages of requirements.txt, then fetch the data and the weights.
Run it again at any time: it keeps what is there.

  --dev              install requirements-dev.txt: also what the tests and the linter need
  --assets-from DIR  copy data and weights from DIR (e.g. ../shared) instead of downloading them
  --help             show this

examples:
  bash setup.sh
  bash setup.sh --dev
  bash setup.sh --assets-from ../shared

PYTHON=/path/to/python3.12 bash setup.sh uses that Python (3.10 to 3.13) for a new .venv.
pip reads its own settings: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels installs offline.
END
}

stop() { # stop CODE MESSAGE
    echo "setup.sh: error: $2" >&2
    exit "$1"
}

is_supported() { # by running it: a name on PATH may be a stub that starts nothing
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop 2 "no Python 3.10 to 3.13 found; install one, or name it in PYTHON (see --help)"
}

requirements=requirements.txt
assets=
while [ $# -gt 0 ]; do
    case $1 in
        --dev) requirements=requirements-dev.txt ;;
        --assets-from)
            [ $# -ge 2 ] || stop 2 "--assets-from needs a folder (see --help)"
            [ -d "$2" ] || stop 2 "--assets-from: $2: no such folder"
            assets=$2
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

root=$(dirname -- "${BASH_SOURCE[0]}")
venv=$root/.venv
if [ -e "$venv" ] || [ -L "$venv" ]; then
    is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        stop 2 "$venv has no working Python 3.10 to 3.13 with pip; move it away and run again"
else
    python=${PYTHON:-$(find_python)}
    is_supported "$python" || stop 2 "PYTHON=$python is not a Python 3.10 to 3.13"
    echo "making .venv"
    trap 'rm -rf "$venv"' EXIT # no half environment after an error or Ctrl-C
    "$python" -m venv "$venv" >/dev/null ||
        stop 1 "$python could not make .venv (Debian and Ubuntu: apt install python3-venv)"
    trap - EXIT
fi

echo "installing $requirements into .venv (the first time takes minutes)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$root/$requirements" ||
    stop 1 "pip could not install $requirements; without a network, give it a folder of wheels:
  PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels bash setup.sh"

if [ ! -f "$root/data/fetch.py" ] || [ ! -f "$root/data/manifest.json" ]; then
    echo "no data/fetch.py or data/manifest.json here: data and weights are not fetched"
    exit 0
fi
status=0
"$venv/bin/python" "$root/data/fetch.py" ${assets:+--assets-from "$assets"} || status=$?
if [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
    exit "$status"
fi

if [ -s "$root/stories42M.pt" ]; then
    echo "ready; next: .venv/bin/python sanity_check.py"
else
    echo "ready, but without stories42M.pt; next: .venv/bin/python run_llama.py --help"
fi
