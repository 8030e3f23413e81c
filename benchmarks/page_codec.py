"""Encode and decode of a `ferry` page against its matrix products alone (design 12).

`kvferry bench codec` for each element type that a cache may have: SmolLM2's own pages,
with its calibration from the user's cache folder (`kvferry calibrate` makes one).
"""

import json
import subprocess
import sys

from benchmarks.record import write_result
from kvferry.codec.base import DType

COMMAND = "kvferry bench codec --model smollm2 --dtype DTYPE --json -"


def main() -> None:
    """Time all element types and write the result."""
    figures = {}
    for dtype in DType:
        command = COMMAND.replace("DTYPE", dtype.value).split()
        done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, check=True)
        figures[dtype.value] = json.loads(done.stdout)
    print(write_result("page_codec", COMMAND, figures).read_text())


if __name__ == "__main__":
    main()
