#!/usr/bin/env bash
# The project's Python environment, <root>/.venv: found, made and kept up to date. tools/quickstart
# and tools/test source this file; run on its own it prepares the environment with the development
# tools and does nothing else.
#
# The environment is up to date when .venv holds, for each requirements file, a copy of the text
# last installed from it (<name>.installed): a comparison of small files, so a call with nothing to
# do costs milliseconds and prints nothing. The project itself is not installed; commands run with
# PYTHONPATH=<root>, so that what runs is always the checkout.
#
# Progress and errors go to stderr. Exit status: 2 this machine lacks something (the message says
# what to do), 1 a step failed, 130 Ctrl-C.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
log=$venv/install.log
lock=$venv/install.lock # not .lock: uv takes that one itself
supported="3.12 3.13" # best first; the pinned megatron-core has wheels on PyPI for these
ask_version='import sys; print("%d.%d" % sys.version_info[:2] + getattr(sys, "abiflags", ""))'
ticker=""

say() { printf '%s\n' "$*" >&2; }

# Succeed if PYTHON (a command or a path) is one of VERSIONS and can make environments; else print
# why not.
vet_python() { # PYTHON VERSIONS
  local version
  if ! command -v "$1" >/dev/null; then
    echo "is not a program"
    return 1
  fi
  if ! version=$("$1" -c "$ask_version" 2>&1 </dev/null); then
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

# List what may be Python VERSION. A name proves nothing (pyenv leaves a shim for every version it
# has, and the shim fails unless that version is chosen), so the caller asks each one.
list_candidates() { # VERSION
  type -aP "python$1" python3 python || true
  local pyenv
  for pyenv in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    printf '%s\n' "$pyenv/versions/$1".*/bin/python
  done
  uv python find --system "$1" 2>/dev/null || true
}

# Print the Python to make the environment with: $PYTHON, or the best here, or one that uv fetches.
find_python() {
  local version candidate reason refused="" wanted="Python ${supported// / or }"
  if [ -n "${PYTHON:-}" ]; then
    if reason=$(vet_python "$PYTHON" "$supported"); then
      echo "$PYTHON"
      return
    fi
    say "PYTHON=$PYTHON $reason. Needed is $wanted: name one, or unset PYTHON to have it searched."
    exit 2
  fi
  for version in $supported; do
    while IFS= read -r candidate; do
      [ -x "$candidate" ] || continue
      if reason=$(vet_python "$candidate" "$version"); then
        echo "$candidate"
        return
      fi
      refused+="  $candidate $reason"$'\n'
    done < <(list_candidates "$version")
  done
  version=${supported%% *}
  if command -v uv >/dev/null; then
    say "fetching Python $version with uv"
    if uv python install "$version" >&2 && uv python find --system "$version"; then return; fi
    say "uv could not fetch Python $version; its message is above."
  fi
  say "No $wanted found on this machine; the pinned megatron-core has wheels for these only."
  [ -z "$refused" ] || say "Looked at:"$'\n'"$(awk '!seen[$0]++' <<<"$refused")"
  say "Install one and run this again, for example
  apt-get install python$version python$version-venv   (Ubuntu 24.04)
  pyenv install $version
  uv python install $version   (uv: https://docs.astral.sh/uv)
or name one: PYTHON=/path/to/python$version $0"
  exit 2
}

# Run COMMAND quietly into the log with one line of progress, which counts where someone watches.
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
    say "and all it said is in $log. Mend the cause and run this again."
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

is_current() { # REQUIREMENTS_FILE…
  local file
  [ -x "$python" ] || return 1 # false, too, for a link to a Python that was removed
  for file; do
    cmp -s "$root/$file" "$venv/$file.installed" || return 1
  done
}

make_venv() {
  local interpreter reason
  if "$python" -c '' 2>/dev/null; then
    if reason=$(vet_python "$python" "$supported"); then return; fi
    say "$python $reason. Needed is Python ${supported// / or }: remove $venv and run this again."
    exit 2
  fi
  interpreter=$(find_python)
  if [ -e "$venv/pyvenv.cfg" ]; then say "$python does not run any more: making .venv anew"; fi
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name install.lock ! -name install.log -exec rm -rf {} +
  phase "making .venv with $interpreter" "$interpreter" -m venv "$venv"
}

# Say whether this machine tells pip where packages come from. uv reads none of that, so pip serves
# such a machine; elsewhere uv, where there is one, is faster.
pip_is_configured() {
  local settings
  settings=$("$python" -m pip config list 2>/dev/null) || return 1
  grep -qE 'index|find-links|cert|proxy|trusted-host' <<<"$settings"
}

install_requirements() { # REQUIREMENTS_FILE…
  local file command=("$python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
  if command -v uv >/dev/null && ! pip_is_configured; then
    command=(uv pip install --python "$python")
  elif ! "$python" -m pip --version >/dev/null 2>&1; then
    phase "adding pip" "$python" -m ensurepip # uv made .venv, or its making was interrupted
  fi
  for file; do command+=(-r "$root/$file"); done
  if ! compgen -G "$venv/lib/python*/site-packages/torch" >/dev/null; then
    say "PyPI's torch for Linux is the CUDA build, on CPU machines too: 4.6 GB once installed"
  fi
  phase "installing $*" "${command[@]}"
  for file; do cp "$root/$file" "$venv/$file.installed"; done
}

# Make .venv hold what the REQUIREMENTS_FILEs (names in <root>) ask for. Of two calls at once, one
# waits and then finds nothing to do.
prepare_environment() { # REQUIREMENTS_FILE…
  if is_current "$@"; then return; fi
  if [ "$(uname -s)" != Linux ]; then
    say "This is for Linux: megatron-core has no wheels for others. Use WSL 2 or a container."
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
    make_venv
    install_requirements "$@"
  fi
  exec 9>&- # what runs next must not hold the lock
  trap - INT TERM EXIT
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  prepare_environment requirements.txt requirements-dev.txt
fi
