# Sourced by quickstart.sh and test.sh, in POSIX sh: finds a Python, makes a virtual environment, installs into it.
#
#   PYTHON  the interpreter to use (default: the first of python3, python3.14 ... python3.10 that is new enough)
#   VENV    the folder of the virtual environment (default: .venv in the project)

fail() { # what, found, next
    printf 'error: %s\n  found:   %s\n  next:    %s\n' "$1" "$2" "$3" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# Sets $interpreter.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.14 python3.13 python3.12 python3.11 python3.10
    fi
    too_old=
    for interpreter in "$@"; do
        if is_new_enough "$interpreter"; then
            return
        fi
        if version=$(version_of "$interpreter"); then
            too_old="$too_old${too_old:+, }$interpreter, which is Python $version"
        fi
    done
    fail "Python 3.10 or newer is needed" "${too_old:-none of: $*}" \
        "install one, or name it: PYTHON=/path/to/python3.12 sh $script"
}

make_environment() {
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "$venv is no virtual environment" "a file or folder of another kind" "name another one: VENV=FOLDER sh $script"
    fi
    find_python
    printf 'Found Python %s (%s); making the virtual environment %s.\n' \
        "$(version_of "$interpreter")" "$(command -v "$interpreter")" "$venv"
    "$interpreter" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "this Python cannot make virtual environments" "no module venv or ensurepip in $interpreter" \
            "on Debian and Ubuntu: apt install python3-venv; or PYTHON=/path/to/another/python3 sh $script"
    "$interpreter" -m venv --clear "$venv" ||
        fail "the virtual environment could not be made" "the message above" "name another folder: VENV=FOLDER sh $script"
}

# prepare_environment REQUIREMENTS: sets $python, in whose environment everything named by that file is installed.
prepare_environment() {
    venv=${VENV:-.venv}
    python=$venv/bin/python
    if ! { is_new_enough "$python" && "$python" -m pip --version >/dev/null 2>&1; }; then
        make_environment
    fi
    stamp=$venv/.installed-$1
    wanted="$(cat requirements.txt "$1" | cksum), Python $(version_of "$python")"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    rm -f "$stamp"
    printf 'Installing %s into %s: some minutes the first time.\n' "$1" "$venv"
    "$python" -m pip install --disable-pip-version-check -r "$1" ||
        fail "the packages could not be installed" "pip's message above" \
            "mend what it names (network, disk space) and start again; what was installed is kept"
    printf '%s\n' "$wanted" >"$stamp"
}

# use_environment REQUIREMENTS [--no-install ...]: what both scripts begin with; sets $python and goes to the project.
use_environment() {
    script=$(basename "$0")
    # Paths that were given are relative to where the user stands.
    case ${VENV:-/} in
        /*) ;;
        *) VENV=$PWD/$VENV ;;
    esac
    case ${PYTHON:-/} in
        /*) ;;
        */*) PYTHON=$PWD/$PYTHON ;;
    esac
    CDPATH='' cd -- "$(dirname -- "$0")" || exit
    if [ "${2:-}" = --no-install ]; then
        python=${PYTHON:-python3}
    else
        prepare_environment "$1"
    fi
}

# Prints a command as it could be typed, then runs it.
show() {
    printf '\n$'
    for word in "$@"; do
        case $word in
            *[!A-Za-z0-9_./=:,+-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$@"
}
