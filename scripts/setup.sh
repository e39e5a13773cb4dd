# Sourced by `demo` and `test`: makes .venv with the package in it, once, and activates it. Nothing global is touched.
#
#   setup_environment EXTRA     EXTRA: recipes (to run) or dev (to test as well)

say() { printf '%s\n' "grpo_toolkit: $*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3.10 python3 python; do
        [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null && { printf '%s' "$candidate"; return 0; }
    done
    return 1
}

setup_environment() {
    local extra=$1 venv=${GRPO_TOOLKIT_VENV:-.venv} python wanted have log
    # The stamp names everything the environment was made from: another pyproject.toml or extra sets up again.
    wanted="$extra $(cksum < pyproject.toml)"
    have=$(cat "$venv/.grpo_toolkit" 2>/dev/null || true)
    if [ "$have" = "$wanted" ] || [ "$have" = "dev $(cksum < pyproject.toml)" ]; then
        say "using the environment in $venv"
    else
        python=$(find_python) || fail "needs Python 3.10 or newer with venv; install one, or name it: PYTHON=/path/to/python3 bash $0"
        [ "$(df -Pk . | awk 'NR == 2 {print $4}')" -gt 12000000 ] ||
            fail "needs 12 GB of free disk here for PyTorch and its libraries; $(df -Ph . | awk 'NR == 2 {print $4}') are free"
        say "setting up $venv with $("$python" --version) (PyTorch and all: several GB, a few minutes; once)"
        log=$(mktemp)
        "$python" -m venv "$venv" >"$log" 2>&1 || { tail -n 3 "$log" >&2; fail "could not make $venv"; }
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]" >"$log" 2>&1 ||
            { grep -i 'error' "$log" | head -n 3 >&2; fail "pip could not install the package (no network, or no disk?); the whole log: $log"; }
        rm -f "$log"
        printf '%s' "$wanted" > "$venv/.grpo_toolkit"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
