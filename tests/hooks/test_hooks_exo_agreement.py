"""Ranks of exo agree on its own entries too; with the contract fake, over MLX's own ring."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_zoo import save_model

from kvferry.node.hooks.pipeline.launch import free_ports

pytestmark = pytest.mark.processes
HERE = Path(__file__).parent


def two_ranks(folder: Path, plain: int = -1) -> list[dict[str, Any]]:
    save_model("llama", folder)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(2):
        environment = dict(os.environ) | {
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(hosts),
            "PYTHONPATH": paths,
        }
        command = [sys.executable, str(HERE / "exo_fake_rank.py"), str(folder)]
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank), str(plain)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            )
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (folder / f"rank{rank}.log").read_text()[-2000:]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def test_what_fails_on_one_rank_is_a_miss_on_both_and_memory_runs_short_on_both(
    tmp_path: Path,
) -> None:
    first, second = two_ranks(tmp_path)
    answers, others = first["answers"], second["answers"]
    kept = answers["not kept on one"], others["not kept on one"]
    assert [hit_token_entries[2] for hit_token_entries in kept] == [2, 1]
    assert {**answers, "not kept on one": None} == {**others, "not kept on one": None}
    assert answers["first"][0] == 0
    assert answers["again"][0] == 298
    assert answers["not found on one"][0] == 0
    assert answers["not kept on one"][0] == 0
    assert answers["asked again"] == [0, answers["not kept on one"][1], 1]  # both forgot all
    assert answers["and again"][0] == 298
    assert answers["memory short on one"][2] == 1
    assert first["triggers"] == second["triggers"] == 1
    assert len({answers[name][1] for name in ("first", "again", "not found on one")}) == 1


def test_a_rank_that_runs_plain_exo_is_noticed(tmp_path: Path) -> None:
    ours, plain = two_ranks(tmp_path, plain=1)
    assert ours == {"everyone": False}
    assert plain == {}
