"""Images in a prompt: exo's media regions as parts of keys.

Tokens say where an image stands and not what it shows. What exo knows of it (a hash of its
pixels) is not all that its numbers depend on: pixels without width and height are
ambiguous, and another vision tower sees something else.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvferry.node.hooks.contract import first_problem
from kvferry.proto.keys import Medium, canonical_json, medium_digest

_CHUNK = 8 << 20
_FIND = "_find_media_regions"
_CALLED = {_FIND: ("prompt_tokens", "images", "image_token_id")}
_USES = {_FIND: ("MediaRegion", "content_hash"), "VisionProcessor.process": (_FIND,)}


def vision_problem(vision: Any) -> str:
    """Why images cannot be told apart for certain; empty where they can."""
    return first_problem(vision, _CALLED, _USES)


def name_images(vision: Any) -> None:
    """Have exo's regions named by the image as it was sent, besides its pixels.

    Args:
        vision: exo's module of this name.
    """
    find = getattr(vision, _FIND)

    def finding(prompt_tokens: Any, images: Any, image_token_id: int) -> Any:
        regions = find(prompt_tokens, images, image_token_id)
        for region, image in zip(regions, images, strict=False):
            region.content_hash += ":" + blake3(str(image).encode()).hexdigest()
        return regions

    setattr(vision, _FIND, finding)


def vision_id(processor: Any, folder: Path, model_folder: Path) -> bytes:
    """Digest of what turns images into numbers. Reads files.

    Args:
        processor: exo's ``VisionProcessor``.
        folder: of the vision tower's files; where it is the model's, the model's id
            covers its weights.
    Raises: OSError, AttributeError.
    """
    hasher = blake3(b"kvferry/vision/1")
    config = processor.vision_config
    about = {"model_type": config.model_type, "image_token_id": config.image_token_id}
    releases = {name: _release(name) for name in ("mlx-vlm", "transformers")}
    hasher.update(canonical_json({**about, **releases}))
    files = sorted(folder.glob("*processor*.json"))
    if folder.resolve() != model_folder.resolve():
        files += sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    for file in files:
        content = blake3()
        with file.open("rb") as stream:
            while data := stream.read(_CHUNK):
                content.update(data)
        hasher.update(canonical_json(file.name))
        hasher.update(content.digest())
    return hasher.digest()


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def media_of(regions: Any, vision: bytes, tokens: int) -> tuple[tuple[Medium, ...], int]:
    """(media, tokens up to the first that nothing tells apart).

    Args:
        regions: exo's, or None.
        vision: `vision_id`; empty: no image can be told from another.
        tokens: of the prompt.
    """
    media: list[Medium] = []
    for region in sorted(regions or (), key=_start):
        start, end = int(region.start_pos), int(region.end_pos)
        if not (vision and region.content_hash and start < end):
            return tuple(media), min(start, tokens)
        content = vision + str(region.content_hash).encode()
        media.append(Medium(start, end, medium_digest(start, end, content)))
    return tuple(media), tokens


def _start(region: Any) -> int:
    return int(region.start_pos)


def clipped(media: Sequence[Medium], tokens: int) -> tuple[Medium, ...]:
    """Those that begin before ``tokens``."""
    return tuple(medium for medium in media if medium.start < tokens)
