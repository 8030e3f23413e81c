"""What exo's ``GET /state`` says, cut down to what a decision can use. Pure.

The shape is that of exo 0.3.70 (`State`, camel case; instances and shards are objects with
their class's name as the one key). What is not understood is left out and counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_NODES = 256
MAX_SHARDS = 1024
MAX_LINKS = 2048
MAX_CHARS = 128
# Half of what a coordinator takes.
MAX_BYTES = 1 << 19
_MAX_NUMBER = 1 << 62
_SHARDINGS = {
    "PipelineShardMetadata": "pipeline",
    "TensorShardMetadata": "tensor",
    "CfgShardMetadata": "cfg",
}
_KINDS = {"wifi": "wifi", "ethernet": "ethernet", "thunderbolt": "thunderbolt"}


def read_state(value: object) -> pb.ExoState:
    """The parsed JSON of ``/state``; anything at all may come."""
    state = _table(value)
    found = pb.ExoState(reachable=True)
    _take_nodes(state, found)
    _take_shards(state, found)
    _take_links(state, found)
    for part in ("links", "shards", "nodes"):
        if found.ByteSize() > MAX_BYTES:
            found.left_out += len(getattr(found, part))
            found.ClearField(part)
    return found


def _take_nodes(state: Mapping[str, Any], found: pb.ExoState) -> None:
    told = _table(state.get("topology")).get("nodes")
    memory, disk = _table(state.get("nodeMemory")), _table(state.get("nodeDisk"))
    ports = _table(state.get("nodeThunderbolt"))
    named = [*_list(told), *memory] if isinstance(told, list) else list(memory)
    for node_id in dict.fromkeys(named):
        if not isinstance(node_id, str) or len(found.nodes) >= MAX_NODES:
            found.left_out += 1
            continue
        who = _table(_table(state.get("nodeIdentities")).get(node_id))
        ram = _table(memory.get(node_id))
        speeds = (
            _text(_table(port).get("linkSpeed"))
            for port in _list(_table(ports.get(node_id)).get("interfaces"))[:16]
        )
        found.nodes.add(
            node_id=_text(node_id),
            name=_text(who.get("friendlyName")),
            chip=_text(who.get("chipId")),
            memory_bytes=_bytes(ram.get("ramTotal")),
            free_memory_bytes=_bytes(ram.get("ramAvailable")),
            free_disk_bytes=_bytes(_table(disk.get(node_id)).get("available")),
            thunderbolt=[speed for speed in speeds if speed],
        )


def _take_shards(state: Mapping[str, Any], found: pb.ExoState) -> None:
    for instance_id, tagged in _table(state.get("instances")).items():
        _, instance = _untag(tagged)
        assigned = _table(instance.get("shardAssignments"))
        places = {
            runner: node
            for node, runner in _table(assigned.get("nodeToRunner")).items()
            if isinstance(runner, str)
        }
        for runner, shard in _table(assigned.get("runnerToShard")).items():
            kind, about = _untag(shard)
            layers = _whole(about.get("startLayer")), _whole(about.get("endLayer"))
            ranks = _whole(about.get("worldSize"))
            fits = kind in _SHARDINGS and layers[0] < layers[1] and ranks
            if not fits or runner not in places or len(found.shards) >= MAX_SHARDS:
                found.left_out += 1
                continue
            found.shards.add(
                model=_text(assigned.get("modelId")),
                node_id=_text(places[runner]),
                layer_start=layers[0],
                layer_end=layers[1],
                layers=_whole(about.get("nLayers")),
                rank=_whole(about.get("deviceRank")),
                ranks=ranks,
                sharding=_SHARDINGS[kind],
                instance=_text(instance_id),
            )


def _take_links(state: Mapping[str, Any], found: pb.ExoState) -> None:
    kinds = dict(_addresses(state))
    connections = _table(_table(state.get("topology")).get("connections"))
    for source, sinks in connections.items():
        for sink, edges in _table(sinks).items():
            for edge in map(_table, _list(edges)):
                if len(found.links) >= MAX_LINKS:
                    found.left_out += 1
                    continue
                address = _text(_table(edge.get("sinkMultiaddr")).get("address"))
                if edge.get("sourceRdmaIface"):
                    kind, address = "rdma", _text(edge["sourceRdmaIface"])
                elif address:
                    kind = kinds.get((sink, _host(address)), "unknown")
                else:
                    found.left_out += 1
                    continue
                found.links.add(source=_text(source), to=_text(sink), kind=kind, address=address)


def _addresses(state: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """((node, IP address), kind of the interface that has it)."""
    for node, network in _table(state.get("nodeNetwork")).items():
        for interface in map(_table, _list(_table(network).get("interfaces"))[:64]):
            kind = _KINDS.get(_text(interface.get("interfaceType")), "unknown")
            yield (node, _text(interface.get("ipAddress"))), kind


def _host(multiaddr: str) -> str:
    """The address in "/ip4/192.168.1.2/tcp/52415"."""
    parts = multiaddr.split("/")
    return parts[2] if len(parts) > 2 else ""


def _untag(value: object) -> tuple[str, Mapping[str, Any]]:
    """(class name, fields) of ``{"ClassName": {...}}``."""
    table = _table(value)
    if len(table) != 1:
        return "", {}
    ((name, inner),) = table.items()
    return name, _table(inner)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    """Short and printable: it goes to other machines and onto screens."""
    if not isinstance(value, str):
        return ""
    return "".join(c for c in value[:MAX_CHARS] if c.isprintable())


def _whole(value: object) -> int:
    """A number that fits 32 bits; 0 for anything else."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    return value if good and isinstance(value, int) else 0


def _bytes(value: object) -> int:
    size = _table(value).get("inBytes")
    good = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < _MAX_NUMBER
    return size if good and isinstance(size, int) else 0
