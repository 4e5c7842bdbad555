#!/usr/bin/env bash
# The project's Python environment, <root>/.venv: create it and keep it up to date. tools/quickstart
# and tools/test source this file. Run on its own, it prepares the environment with the development
# tools and does nothing else.
#
# The environment is up to date when
#   - .venv holds, for each requirements file, a copy of the text last installed from it
#     (<name>.installed), and
#   - the checkout is installed editable: a .pth file of .venv names <root>, so that every module of
#     megatron_q3n, tools and slurm imports by its full name. A .venv that came with a moved or
#     copied checkout names another folder and is corrected.
# Both are comparisons of small files: a call with nothing to do takes milliseconds and prints
# nothing.
#
# Progress and errors go to stderr. Exit status: 2 the machine lacks a prerequisite (the message
# says what to do), 1 a step failed, 130 Ctrl-C.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
log=$venv/install.log
# not .lock: uv locks that file itself
lock=$venv/install.lock
# in order of preference; the pinned megatron-core has wheels on PyPI for these
supported="3.12 3.13"
version_query='import sys; print("%d.%d" % sys.version_info[:2] + getattr(sys, "abiflags", ""))'
ticker=""

say() { printf '%s\n' "$*" >&2; }

# Succeed if PYTHON (a command or a path) has one of VERSIONS and can create environments; otherwise
# print the reason.
check_python() { # PYTHON VERSIONS
  local version
  if ! command -v "$1" >/dev/null; then
    echo "is not a program"
    return 1
  fi
  if ! version=$("$1" -c "$version_query" 2>&1 </dev/null); then
    echo "does not run: ${version%%$'\n'*}"
    return 1
  fi
  if [[ " $2 " != *" $version "* ]]; then
    echo "is Python $version"
    return 1
  fi
  if ! "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
    echo "lacks the venv module (Debian, Ubuntu: apt-get install python$version-venv)"
    return 1
  fi
}

# List programs that may be Python VERSION. A name proves nothing (pyenv installs a shim for every
# version it has, and the shim fails unless that version is selected), so the caller runs each one.
list_candidates() { # VERSION
  type -aP "python$1" python3 python || true
  local pyenv
  for pyenv in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    printf '%s\n' "$pyenv/versions/$1".*/bin/python
  done
  uv python find --system "$1" 2>/dev/null || true
}

# Print the Python to create the environment with: $PYTHON, else the best on this machine, else one
# that uv installs.
find_python() {
  local version candidate reason rejected="" required="Python ${supported// / or }"
  if [ -n "${PYTHON:-}" ]; then
    if reason=$(check_python "$PYTHON" "$supported"); then
      echo "$PYTHON"
      return
    fi
    say "PYTHON=$PYTHON $reason. Required: $required. Name one, or unset PYTHON to search for it."
    exit 2
  fi
  for version in $supported; do
    while IFS= read -r candidate; do
      [ -x "$candidate" ] || continue
      if reason=$(check_python "$candidate" "$version"); then
        echo "$candidate"
        return
      fi
      rejected+="  $candidate $reason"$'\n'
    done < <(list_candidates "$version")
  done
  version=${supported%% *}
  if command -v uv >/dev/null; then
    say "installing Python $version with uv"
    if uv python install "$version" >&2 && uv python find --system "$version"; then return; fi
    say "uv could not install Python $version; its message is above."
  fi
  say "No $required found on this machine; the pinned megatron-core has wheels for these only."
  [ -z "$rejected" ] || say "Checked:"$'\n'"$(awk '!seen[$0]++' <<<"$rejected")"
  say "Install one and run this again, for example
  apt-get install python$version python$version-venv   (Ubuntu 24.04)
  pyenv install $version
  uv python install $version   (uv: https://docs.astral.sh/uv)
or name one: PYTHON=/path/to/python$version $0"
  exit 2
}

# Run COMMAND with its output in the log, and show one line of progress; on a terminal the line shows
# the elapsed seconds.
phase() { # DESCRIPTION COMMAND…
  local what=$1 began=$SECONDS
  shift
  printf '\n+ %s\n' "$*" >>"$log"
  if [ -t 2 ]; then
    while :; do
      printf '\r\033[K%s … %d s  %.50s' "$what" $((SECONDS - began)) "$(tail -n 1 "$log")" >&2
      sleep 1
    done 9>&- &
    ticker=$!
  else
    say "$what …"
  fi
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    stop_ticker
    tail -n 15 "$log" | sed 's/^/  | /' >&2
    say "$what failed after $((SECONDS - began)) s. The command was"
    say "  $*"
    say "and its whole output is in $log. Fix the cause and run this again."
    exit 1
  fi
  stop_ticker
  say "$what: done in $((SECONDS - began)) s"
}

stop_ticker() {
  [ -n "$ticker" ] || return 0
  kill "$ticker" 2>/dev/null || true
  ticker=""
  printf '\r\033[K' >&2
}

has_requirements() { # REQUIREMENTS_FILE…
  local file
  # false, too, for a link to a Python that was removed
  [ -x "$python" ] || return 1
  for file; do
    cmp -s "$root/$file" "$venv/$file.installed" || return 1
  done
}

# Succeed if .venv imports from this checkout: some .pth file has the checkout's path as a line.
has_checkout() {
  local path
  path=$(cd "$root" && pwd -P)
  grep -qsxF -- "$path" "$venv"/lib/python*/site-packages/*.pth
}

is_current() { # REQUIREMENTS_FILE…
  has_requirements "$@" && has_checkout
}

create_venv() {
  local interpreter reason
  if "$python" -c '' 2>/dev/null; then
    if reason=$(check_python "$python" "$supported"); then return; fi
    say "$python $reason. Required: Python ${supported// / or }. Remove $venv and run this again."
    exit 2
  fi
  interpreter=$(find_python)
  if [ -e "$venv/pyvenv.cfg" ]; then say "$python does not run: creating .venv again"; fi
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name install.lock ! -name install.log -exec rm -rf {} +
  phase "creating .venv with $interpreter" "$interpreter" -m venv "$venv"
}

# Succeed if pip has settings on this machine for where packages come from. uv does not read them, so
# pip is used then; elsewhere uv is used where it exists, because it is faster.
pip_is_configured() {
  local settings
  settings=$("$python" -m pip config list 2>/dev/null) || return 1
  grep -qE 'index|find-links|cert|proxy|trusted-host' <<<"$settings"
}

# Set `installer` to the command that installs packages into .venv.
choose_installer() {
  installer=("$python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
  if command -v uv >/dev/null && ! pip_is_configured; then
    installer=(uv pip install --python "$python")
  elif ! "$python" -m pip --version >/dev/null 2>&1; then
    # .venv was created by uv, or its creation was interrupted
    phase "adding pip" "$python" -m ensurepip
  fi
}

install_requirements() { # REQUIREMENTS_FILE…
  local file command=("${installer[@]}")
  for file; do command+=(-r "$root/$file"); done
  if ! compgen -G "$venv/lib/python*/site-packages/torch" >/dev/null; then
    say "PyPI's torch for Linux is the CUDA build, on CPU machines too: 4.6 GB once installed"
  fi
  phase "installing $*" "${command[@]}"
  for file; do cp "$root/$file" "$venv/$file.installed"; done
}

# Install the checkout editable. Without build isolation, since the requirements bring setuptools:
# a moved checkout is corrected without a network.
install_checkout() {
  phase "installing the checkout (editable)" \
    "${installer[@]}" --no-deps --no-build-isolation --editable "$root"
  if ! has_checkout; then
    say "No .pth file of $venv names $root after this: the checkout's modules would not be found."
    say "The installer's output is in $log."
    exit 1
  fi
}

# Make .venv hold the packages of the REQUIREMENTS_FILEs (names in <root>) and this checkout. Of two
# calls at once, the second waits for the first and then finds nothing to do.
prepare_environment() { # REQUIREMENTS_FILE…
  local installer
  if is_current "$@"; then return; fi
  if [ "$(uname -s)" != Linux ]; then
    say "Only Linux is supported: megatron-core has no wheels for other systems. Use WSL 2 or a container."
    exit 2
  fi
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap stop_ticker EXIT
  mkdir -p "$venv"
  exec 9>"$lock"
  if ! flock -n 9; then
    say "another call is preparing $venv; waiting for it"
    flock 9
  fi
  if ! is_current "$@"; then
    : >"$log"
    create_venv
    choose_installer
    has_requirements "$@" || install_requirements "$@"
    has_checkout || install_checkout
  fi
  # the program that runs next must not hold the lock
  exec 9>&-
  trap - INT TERM EXIT
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  prepare_environment requirements.txt requirements-dev.txt
fi
