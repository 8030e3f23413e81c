"""exo's ``/state`` as it would be for two Macs, and a server that gives it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STUDIO, LAPTOP = "12D3KooWStudio", "12D3KooWLaptop"
MODEL = "mlx-community/Qwen3-30B-A3B-4bit"


def _memory(total: int, free: int) -> dict[str, Any]:
    return {
        "ramTotal": {"inBytes": total},
        "ramAvailable": {"inBytes": free},
        "swapTotal": {"inBytes": 0},
        "swapAvailable": {"inBytes": 0},
    }


def _shard(start: int, end: int, rank: int) -> dict[str, Any]:
    card = {"modelId": MODEL, "storageSize": {"inBytes": 17_000_000_000}, "nLayers": 48}
    return {
        "PipelineShardMetadata": {
            "modelCard": card,
            "deviceRank": rank,
            "worldSize": 2,
            "immediateException": False,
            "shouldTimeout": None,
            "startLayer": start,
            "endLayer": end,
            "nLayers": 48,
        }
    }


def state() -> dict[str, Any]:
    """A studio with 32 layers and a laptop with 16, joined by Thunderbolt and Wi-Fi."""
    return {
        "instances": {
            "inst-1": {
                "MlxRingInstance": {
                    "instanceId": "inst-1",
                    "shardAssignments": {
                        "modelId": MODEL,
                        "runnerToShard": {"run-a": _shard(0, 32, 0), "run-b": _shard(32, 48, 1)},
                        "nodeToRunner": {STUDIO: "run-a", LAPTOP: "run-b"},
                    },
                    "hostsByNode": {},
                    "ephemeralPort": 52416,
                }
            }
        },
        "runners": {"run-a": {"RunnerReady": {}}, "run-b": {"RunnerRunning": {}}},
        "downloads": {},
        "tasks": {},
        "lastSeen": {STUDIO: "2026-06-22T10:00:00Z"},
        "topology": {
            "nodes": [STUDIO, LAPTOP],
            "connections": {
                STUDIO: {
                    LAPTOP: [
                        {"sinkMultiaddr": _multiaddr("169.254.7.2")},
                        {"sinkMultiaddr": _multiaddr("192.168.1.7")},
                        {"sourceRdmaIface": "rdma_en2", "sinkRdmaIface": "rdma_en3"},
                    ]
                }
            },
        },
        "lastEventAppliedIdx": 812,
        "nodeIdentities": {
            STUDIO: {"modelId": "Mac Studio", "chipId": "Apple M3 Ultra", "friendlyName": "studio"},
            LAPTOP: {"modelId": "MacBook Pro", "chipId": "Apple M4 Max", "friendlyName": "Ada's"},
        },
        "nodeMemory": {STUDIO: _memory(512 << 30, 300 << 30), LAPTOP: _memory(64 << 30, 20 << 30)},
        "nodeDisk": {STUDIO: {"total": {"inBytes": 4 << 40}, "available": {"inBytes": 1 << 40}}},
        "nodeNetwork": {
            LAPTOP: {
                "interfaces": [
                    {"name": "en0", "ipAddress": "192.168.1.7", "interfaceType": "wifi"},
                    {"name": "bridge0", "ipAddress": "169.254.7.2", "interfaceType": "thunderbolt"},
                ]
            }
        },
        "nodeThunderbolt": {
            LAPTOP: {
                "interfaces": [
                    {"rdmaInterface": "rdma_en3", "domainUuid": "U", "linkSpeed": "Up to 80 Gb/s"}
                ]
            }
        },
    }


def _multiaddr(address: str) -> dict[str, str]:
    return {"address": f"/ip4/{address}/tcp/52415", "addressType": "ip4"}


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """An HTTP server on a free port; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def giving(value: object) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answers ``/state`` with ``value`` as JSON (bytes: as they are), all else with 404."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200 if request.path == "/state" else 404)
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)

    return answer
