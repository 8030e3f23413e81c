"""The README's section on transformers does what it says, with a real store."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from store_process import running

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.hf

DEFAULT = "127.0.0.1:7800"


def examples() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("## With transformers")[2]
    return re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_second_process_restores_what_the_first_has_prefilled(tmp_path: Path) -> None:
    code = examples()[0]
    assert DEFAULT in code
    with running(tmp_path / "store") as store:
        first, second = (run(code.replace(DEFAULT, store.address)) for _ in range(2))
    (held, count, answer), again = (
        re.fullmatch(r"(\d+) of (\d+) tokens restored: (.*)\n", text, re.DOTALL).groups()
        for text in (first, second)
    )
    assert (held, answer) == ("0", again[2])
    # whole pages: the end that was stored goes on with the answer
    assert 256 <= int(again[0]) < int(count)
    assert int(again[0]) % 256 == 0


def test_a_compressed_cache_is_smaller_and_answers_alike() -> None:
    told = run(examples()[2])
    assert float(told.partition(" ")[0]) > 1.5


def test_a_cache_without_most_of_its_pages_goes_on() -> None:
    rows, tokens = re.match(r"(\d+) rows of (\d+) tokens: ", run(examples()[1])).groups()
    # 64 of all whole pages that lie 128 tokens behind the end
    pages = (int(tokens) - 128) // 256
    assert pages > 0
    assert int(rows) == int(tokens) - 256 * pages + 64
