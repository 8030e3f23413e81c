"""Start all ranks of one model in real exo, and wait for their answers."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.cli.demo.cluster import Cluster
from kvferry.node.hooks.pipeline.launch import free_ports

PYTHON = os.environ.get("KVFERRY_EXO_PYTHON", "")
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is divided: layers of each rank, or heads among ``tensor`` ranks."""

    layers: tuple[tuple[int, int], ...]
    tensor: bool = False

    @property
    def world(self) -> int:
        return len(self.layers)


def run_exo(
    split: Split,
    folder: Path,
    cluster: Cluster,
    work: Path,
    requests: Sequence[dict[str, Any]],
    faults: dict[int, list[str]] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Fresh processes serve ``requests``; answers by rank. See `exo_ranks`.

    Args:
        faults: rank -> what is wrong with it from its start.
    """
    work.mkdir(parents=True, exist_ok=True)
    hosts = work / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(split.world)]))
    model = json.loads((folder / "config.json").read_text())
    processes = []
    for rank, layers in enumerate(split.layers):
        config = {
            "folder": str(folder),
            "socket": str(cluster.sockets[rank % len(cluster.sockets)]),
            "cache_dir": str(work / f"cache{rank}"),
            "rank": rank,
            "world": split.world,
            "tensor": split.tensor,
            "layers": layers,
            "layer_count": model["num_hidden_layers"],
            "requests": list(requests),
            "faults": (faults or {}).get(rank, []),
            **more,
        }
        environment = dict(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}
        if split.world > 1:
            environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        script = str(Path(__file__).parent / "exo_ranks.py")
        with (work / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [PYTHON, script, json.dumps(config)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            )
    return _answers(processes, work)


def save_v4_model(folder: Path) -> None:
    """Over the files of another model; see `exo_ranks.save_deepseek_v4`."""
    script = str(Path(__file__).parent / "exo_ranks.py")
    subprocess.run([PYTHON, script, json.dumps({"save_v4": str(folder)})], check=True, timeout=60)


def _answers(processes: Sequence["subprocess.Popen[str]"], work: Path) -> list[dict[str, Any]]:
    answers = []
    try:
        for rank, process in enumerate(processes):
            printed, _ = process.communicate(timeout=TIMEOUT_S)
            said = (work / f"rank{rank}.log").read_text()[-3000:]
            assert process.returncode == 0, f"rank {rank}: {said}"
            answers.append(json.loads(printed.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        logs = [(work / f"rank{rank}.log").read_text()[-1500:] for rank in range(len(processes))]
        raise AssertionError("no answer in time: " + "\n---\n".join(logs)) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    return answers
