# Sourced by launch/quickstart.sh, tests/run.sh and .ci/run: makes the project's virtual environment and enters it.
#
#   VENV    where it stands (default: .venv in the checkout)
#   PYTHON  the interpreter it is made from (default: python3)
#
# An environment that was set up for the same setup.cfg is used as it is.

setup_env() {
    local root venv stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=$(realpath -m "${VENV:-$root/.venv}")

    mkdir -p "$venv"
    # Two runs that start together must not both install.
    exec 9> "$venv/.setup.lock"
    flock 9

    # An interrupted start leaves an interpreter without pip.
    if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
        echo "setup: a new virtual environment in $venv" >&2
        "${PYTHON:-python3}" -m venv "$venv" || return 1
    fi
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: Python 3.11 or newer is needed; $venv has $("$venv/bin/python" --version)" >&2
        return 1
    }
    stamp=$(cd "$root" && { cat setup.cfg pyproject.toml ds_vshape/__init__.py "${BASH_SOURCE[0]}"; pwd; } | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$venv/.ds_vshape_stamp" 2> /dev/null)" != "$stamp" ]; then
        echo "setup: installing into $venv (some minutes the first time)" >&2
        # torch comes first and alone: whatever depends on it must find it there and not choose a build of its own.
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' || return 1
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[test,lint]" || return 1
        echo "$stamp" > "$venv/.ds_vshape_stamp"
    fi
    exec 9>&-

    # What `activate` does, without its functions and its prompt.
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
}

setup_env
