# Sourced by `demo` and `test`: makes an environment with the package in it, once, and activates it. Nothing global
# is touched.
#
#   setup_environment VENV EXTRA [REQUIREMENT...]     EXTRA: recipes (to run), dev (to test as well), dev,trackers

say() { printf '%s\n' "grpo_toolkit: $*" >&2; }
fail() { say "$*"; exit 1; }

# The older stacks that the package promises to work beside.
#   middle   transformers 4.57, TRL 1.0
#   oldest   transformers 4.49, TRL 0.15 (pyproject.toml allows 0.14 too), where VLM-R1 and its descendants live
stack_requirements() {
    case $1 in
        newest) ;;
        middle) echo "transformers==4.57.* trl==1.0.*" ;;
        oldest) echo "transformers==4.49.* trl==0.15.* peft==0.14.* accelerate==1.3.*" ;;
        *) fail "unknown stack '$1': newest, middle, oldest or all" ;;
    esac
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3.13 python3.10 python3 python}; do
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null &&
            { printf '%s' "$candidate"; return 0; }
    done
    return 1
}

setup_environment() {
    local venv=$1 extra=$2 python wanted have log
    shift 2
    # The stamp names everything the environment was made from and where: another pyproject.toml, or a folder that was
    # moved or copied, sets up again. An environment to test in (dev) also serves to run (recipes).
    wanted="$* $PWD $(cksum < pyproject.toml)"
    have=$(cat "$venv/.grpo_toolkit" 2>/dev/null || true)
    if [ "$have" != "$extra $wanted" ] && ! [[ $extra = recipes && $have = dev*" $wanted" ]]; then
        python=$(find_python) ||
            fail "needs Python 3.10 or newer with venv${PYTHON:+, and PYTHON=$PYTHON is not}; name one: PYTHON=/path/to/python3 bash $0"
        [ "$(df -Pk . | awk 'NR == 2 {print $4}')" -gt 12000000 ] ||
            fail "needs 12 GB of free disk here for PyTorch; $(df -Ph . | awk 'NR == 2 {print $4}') are free"
        say "setting up $venv with $("$python" --version)${*:+ and $*} (several GB, a few minutes; once)"
        log=$(mktemp)
        "$python" -m venv --clear "$venv" >"$log" 2>&1 || fail "could not make $venv: $(tail -n 1 "$log")"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]" "$@" >"$log" 2>&1 ||
            fail "pip could not install the package (no network, or no disk?): $(grep '^ERROR' "$log" | head -n 1); the whole log: $log"
        rm -f "$log"
        printf '%s' "$extra $wanted" > "$venv/.grpo_toolkit"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
