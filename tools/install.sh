#!/bin/sh
# Make .venv from requirements.lock and install this project into it; does nothing when that is done already.
# Works with an empty environment, without a home directory, and with or without uv.
# VENV names another directory, here or anywhere. RESOLUTION takes, instead of the pins, the lowest versions that pyproject.toml allows
# (lowest-direct) or the newest there are (highest); what this project does not name itself is the newest in both.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
resolution=${RESOLUTION:-}

say() { printf '%s\n' "$*" >&2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

python=
if [ -n "${PYTHON:-}" ]; then
  supported "$PYTHON" && python=$PYTHON
else
  for candidate in python3 python3.13 python3.12 python3.11; do
    if supported "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ]; then
  say "langchain-aegis needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.12 ..."
  exit 1
fi

# What would be installed, in one line. If the environment says the same, there is nothing to do.
wanted=$("$python" - "$resolution" <<'PY'
import hashlib, pathlib, sys
files = ("requirements.lock", "pyproject.toml", "tools/install.sh")
digest = hashlib.sha256(b"\0".join(pathlib.Path(f).read_bytes() for f in files)).hexdigest()
version = ".".join(map(str, sys.version_info[:3]))
print(" ".join([str(pathlib.Path.cwd()), version, digest, *filter(None, sys.argv[1:])]))
PY
)
if [ "${1:-}" != lock ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

if [ -z "${HOME:-}" ] || [ ! -w "${HOME:-/nonexistent}" ]; then
  UV_CACHE_DIR=${UV_CACHE_DIR:-$PWD/.cache/uv} PIP_CACHE_DIR=${PIP_CACHE_DIR:-$PWD/.cache/pip}
  export UV_CACHE_DIR PIP_CACHE_DIR
fi
UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1} UV_LINK_MODE=${UV_LINK_MODE:-copy} UV_NO_PROGRESS=1
PIP_DISABLE_PIP_VERSION_CHECK=1
export UV_SYSTEM_CERTS UV_LINK_MODE UV_NO_PROGRESS PIP_DISABLE_PIP_VERSION_CHECK

uv=${UV:-$(command -v uv || true)}
if [ -z "$uv" ]; then
  uv=.uv/bin/uv
  if ! "$uv" --version >/dev/null 2>&1; then
    say "installing uv into .uv ..."
    rm -rf .uv
    "$python" -m venv .uv
    .uv/bin/python -m pip install --quiet --require-hashes --only-binary :all: -r tools/installer.lock
  fi
fi

if [ "${1:-}" = lock ]; then
  exec "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --all-extras --group test --group tools --group models pyproject.toml -o requirements.lock
fi

say "installing into $venv ..."
rm -rf "$venv"
"$uv" venv --quiet --no-python-downloads --python "$("$python" -c 'import sys; print(sys.executable)')" "$venv"
case $venv in
  /*) VIRTUAL_ENV=$venv ;;
  *) VIRTUAL_ENV=$PWD/$venv ;;
esac
export VIRTUAL_ENV
if [ -z "$resolution" ]; then
  "$uv" pip install --quiet --no-deps --require-hashes --compile-bytecode -r requirements.lock
else
  # Without building anything: a version that has no wheel for this interpreter is not one that is supported on it.
  "$uv" pip compile --quiet --python "$venv/bin/python" --resolution "$resolution" --only-binary :all: --no-header \
    --no-annotate --no-emit-index-url --all-extras --group test --group tools --group models pyproject.toml \
    -o "$venv/resolved.txt"
  "$uv" pip install --quiet --no-deps --only-binary :all: --compile-bytecode -r "$venv/resolved.txt"
fi
"$uv" pip install --quiet --no-deps --no-build-isolation --compile-bytecode -e .
"$venv/bin/python" -m compileall -q langchain_aegis tests >/dev/null || true
printf '%s\n' "$wanted" > "$venv/.installed"
