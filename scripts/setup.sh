# Makes .venv in the repository's root and installs the project into it; safe to repeat.
# Sourced by quickstart.sh, test.sh and setup_peer.sh: `install_into_venv ".[dev]"`. Uses uv when it is there.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2
  return 1
}

install_into_venv() {
  local what=$1 python
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --python '>=3.11' .venv
    uv pip install --python .venv/bin/python -e "$what"
  else
    if [ ! -x .venv/bin/python ]; then
      python=$(find_python)
      "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$what"
  fi
}
