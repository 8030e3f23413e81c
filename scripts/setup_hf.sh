#!/bin/sh
# The extra `hf` in an environment of its own that sees all that $VENV has. On Linux PyPI's
# torch brings CUDA along (gigabytes); PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU builds.
set -eu
[ -x "$HF/bin/python" ] || "$VENV/bin/python" -m venv "$HF"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
base=$("$VENV/bin/python" -c "$purelib")
echo "import site; site.addsitedir('$base')" >"$("$HF/bin/python" -c "$purelib")/base.pth"
"$HF/bin/python" - <<'END' | xargs "$HF/bin/python" -m pip install --quiet \
    --disable-pip-version-check --constraint constraints.txt
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["hf"], sep="\n")
END
