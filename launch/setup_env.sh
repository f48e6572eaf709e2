#!/usr/bin/env bash
# Find or make the Python environment of this checkout.
#
#   bash launch/setup_env.sh          make .venv, or bring it up to date; progress goes to stderr and
#                                     the resulting variables, as shell code, to stdout
#   source launch/setup_env.sh        the same, and set the variables in this shell
#   bash launch/setup_env.sh --find   only look for a ready environment
#
# POWEROPD_PYTHON     use this Python, whose packages are yours; nothing is installed into it
# POWEROPD_VENV       where the environment is made (default: .venv in the checkout)
# POWEROPD_EXTRAS     optional dependencies of pyproject.toml, such as "test,lint"
# POWEROPD_INDEX_URL  package index that pip is given; pip's own configuration holds in any case
# POWEROPD_CUDA       auto, 0 or 1: whether the CUDA kernels are compiled (see setup.py)
#
# An active environment or a container's python3 that has everything pyproject.toml asks for is used
# as it is; only the kernels are compiled, into the checkout. Where they can't be, plain torch takes
# their place. The result is POWEROPD_PYTHON and, for a Python that isn't ours, PYTHONPATH.

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    poweropd_environment=$(bash "${BASH_SOURCE[0]}") && eval "$poweropd_environment"
    return
fi

set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${POWEROPD_VENV:-$repo/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
extras=${POWEROPD_EXTRAS:-}
stamp=$venv/.poweropd_stamp
lock=$venv/.poweropd_lock
log=$venv/setup.log

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*" >&2; }

fail() {
    printf 'setup_env.sh: %s\n' "$1" >&2
    exit "${2:-2}"
}

publish() {
    printf 'export POWEROPD_PYTHON=%q\n' "$1"
    if [[ $1 != "$venv/bin/python" || ! -e $stamp ]] && [[ :${PYTHONPATH:-}: != *":$repo:"* ]]; then
        printf 'export PYTHONPATH=%q\n' "$repo${PYTHONPATH:+:$PYTHONPATH}"
    fi
    exit 0
}

# Prints what Python $1 lacks of pyproject.toml; fails if it lacks anything. A container's torch
# is often a pre-release such as 2.14.0a0+nv, so its base version counts.
has_packages() {
    "$1" - "$repo/pyproject.toml" "$extras" 2>&1 <<'PYTHON' || return 1
import sys

if sys.version_info < (3, 12):
    sys.exit("Python >= 3.12 (it is %d.%d)" % sys.version_info[:2])

import tomllib
from importlib import metadata

sys.path = [folder for folder in sys.path if folder]
try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    sys.exit("packaging")

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = list(project["dependencies"])
for extra in filter(None, sys.argv[2].split(",")):
    wanted += project["optional-dependencies"][extra]

missing = []
for requirement in map(Requirement, wanted):
    try:
        found = Version(metadata.version(requirement.name)).base_version
    except metadata.PackageNotFoundError:
        missing.append(str(requirement))
    else:
        if found not in requirement.specifier:
            missing.append("%s (it has %s)" % (requirement, found))
sys.exit(", ".join(missing) or 0)
PYTHON
}

kernel_sources() { cat "$repo/setup.py" "$repo"/csrc/*.h "$repo"/csrc/*/*; }

fingerprint() {
    {
        cat "$repo/constraints.txt" "$repo/pyproject.toml"
        kernel_sources
        echo "$repo"
        "$venv/bin/python" -VV
    } | cksum
}

# The stamp is written last: a hash on its first line, the installed extras on its second.
is_current() {
    local installed extra
    [[ -e $stamp && $(head -n 1 "$stamp") == "$(fingerprint 2>/dev/null)" ]] || return 1
    installed=,$(tail -n 1 "$stamp"),
    for extra in ${extras//,/ }; do
        [[ $installed == *",$extra,"* ]] || return 1
    done
}

# Compiles the kernels for a Python that isn't ours, unless that was done, or only looked for.
compile_kernels() {
    local stamp=$repo/build/kernels.stamp key
    [[ $mode != --find ]] || return 0
    key=$(
        kernel_sources | cksum
        "$1" -c 'import sys; from importlib.metadata import version; print(sys.version, version("torch"))'
    )
    [[ ! -e $stamp || $(<"$stamp") != "$key" ]] || return 0
    if ! mkdir -p -- "$repo/build" 2>/dev/null || [[ ! -w $repo/build ]]; then
        say "the kernels aren't compiled: $repo can't be written to"
        return 0
    fi
    log=$repo/build/setup.log
    : >"$log"
    cd -- "$repo"
    if attempt "compiling the kernels for $1 (log: $log)" "$1" setup.py build_ext --inplace; then
        printf '%s\n' "$key" >"$stamp"
        say "$(cat build/extension.txt)"
    else
        say "they could not be compiled, so plain torch is used; see $log"
    fi
}

use_chosen_python() {
    local missing
    missing=$(has_packages "$POWEROPD_PYTHON") ||
        fail "POWEROPD_PYTHON=$POWEROPD_PYTHON lacks ${missing:-everything: it does not run}; install that there, or unset POWEROPD_PYTHON"
    compile_kernels "$POWEROPD_PYTHON"
    publish "$POWEROPD_PYTHON"
}

use_active_environment() {
    local prefix missing
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        [[ -n $prefix && -x $prefix/bin/python ]] || continue
        [[ ! -e $lock || ! $prefix -ef $venv ]] || continue
        if missing=$(has_packages "$prefix/bin/python"); then
            say "using the active environment $prefix"
            compile_kernels "$prefix/bin/python"
            publish "$prefix/bin/python"
        fi
        say "the active environment $prefix is not used: it lacks $missing"
    done
}

use_python_on_path() {
    local python
    python=$(type -P python3) || return 0
    if has_packages "$python" >/dev/null; then
        say "using $python, which has every package"
        compile_kernels "$python"
        publish "$python"
    fi
}

list_candidates() {
    local name
    for name in python3.12 python3.13 python3.14 python3 python; do
        type -aP "$name" || true
    done
    for name in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        [[ -x $name ]] && echo "$name"
    done
    UV_PYTHON_PREFERENCE=only-managed uv python find --system --no-project '>=3.12' 2>/dev/null || true
}

# Prints a Python that can make environments. Version managers leave shims of versions that
# aren't selected on PATH, so each candidate has to prove that it runs.
find_base_python() {
    local python verdict tried=
    while read -r python; do
        verdict=$("$python" - 2>/dev/null <<'PYTHON'
import sys

if sys.version_info < (3, 12):
    print("is %d.%d, older than 3.12" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
        print("ok")
    except ImportError:
        print("has no venv or ensurepip (on Debian and Ubuntu: apt-get install python3-venv)")
PYTHON
        ) || verdict="does not run"
        if [[ $verdict == ok ]]; then
            echo "$python"
            return
        fi
        [[ $tried == *"  $python "* ]] || tried+="  $python $verdict"$'\n'
    done < <(list_candidates)
    fail "no Python >= 3.12 was found. Tried:
${tried:-  nothing: PATH has no python, and neither pyenv nor uv has one
}Get one in any of these ways, then run this again:
  uv python install 3.12
  pyenv install 3.12
  apt-get install python3 python3-venv   (Debian 13, Ubuntu 24.04 or later)
  dnf install python3.12                 (Fedora, RHEL 9 or later)"
}

# attempt <what> <command...>: run a command as a process group, which a signal to this script ends.
child=
interrupt() {
    [[ -z $child ]] || kill -- "-$child" 2>/dev/null
    say "interrupted; run it again to go on"
    exit "$1"
}
trap 'interrupt 130' INT
trap 'interrupt 143' TERM
attempt() {
    local status=0
    say "$1"
    shift
    set -m
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    set +m
    wait "$child" || status=$?
    child=
    return "$status"
}

step() {
    local status=0
    attempt "$@" || status=$?
    if ((status)); then
        tail -n 25 "$log" >&2
        fail "failed with exit code $status; the whole log is $log" 1
    fi
}

install() {
    local pip=("$venv/bin/python" -m pip install --constraint "$repo/constraints.txt"
        ${POWEROPD_INDEX_URL:+--index-url "$POWEROPD_INDEX_URL"})
    local installed="" base
    if [[ -e $stamp ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        installed=$(tail -n 1 "$stamp")
        : >"$log"
        say "bringing $venv up to date"
    else
        base=$(find_base_python)
        find "$venv" -mindepth 1 -maxdepth 1 ! -path "$lock" -exec rm -rf {} +
        step "making $venv with $("$base" --version) ($base)" "$base" -m venv "$venv"
    fi
    rm -f "$stamp"
    extras=$(tr ',' '\n' <<<"$installed,$extras" | sed '/^$/d' | sort -u | paste -sd, -)
    step "installing torch and build tools (some GB and minutes the first time; log: $log)" \
        "${pip[@]}" setuptools ninja torch numpy
    cd -- "$repo"
    step "compiling the kernels and installing the other pinned packages" \
        "${pip[@]}" --no-build-isolation --editable ".${extras:+[$extras]}"
    [[ ! -e build/extension.txt ]] || say "$(cat build/extension.txt)"
    printf '%s\n' "$(fingerprint)" "$extras" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
    say "$venv is ready"
}

mode=${1:-}
if [[ -n ${POWEROPD_PYTHON:-} && $POWEROPD_PYTHON != "$venv/bin/python" ]]; then
    [[ $mode != --find ]] || publish "$POWEROPD_PYTHON"
    use_chosen_python
fi
use_active_environment
is_current && publish "$venv/bin/python"
if [[ $mode == --find && -e $stamp ]]; then
    say "constraints.txt, pyproject.toml or the checkout's place changed since $venv was made: launch/setup_env.sh updates it"
    publish "$venv/bin/python"
fi
if [[ ! -e $lock && -x $venv/bin/python ]] && has_packages "$venv/bin/python" >/dev/null; then
    say "using $venv"
    publish "$venv/bin/python"
fi
use_python_on_path
if [[ $mode == --find ]]; then
    fail "no environment with the project's packages was found: run 'bash $repo/launch/setup_env.sh' first, or set POWEROPD_PYTHON"
fi

mkdir -p -- "$venv"
# The lock is the first thing in a folder of ours; looked for last, it can't be missed.
contents=$(ls -A -- "$venv")
if [[ -n $contents && ! -e $lock ]]; then
    fail "$venv exists and was not made by this script: remove it, or choose another folder with POWEROPD_VENV"
fi
exec 9>>"$lock"
if type -P flock >/dev/null && ! flock --nonblock 9; then
    step "waiting for another setup of $venv" flock 9
fi
is_current || install
publish "$venv/bin/python"
