"""One model: can it be read, who is it to the cluster, is it calibrated?"""

from collections.abc import Iterator

from kvferry.cli.doctor.finding import FAIL, OK, WARN, Finding, size
from kvferry.errors import CodecError, ConfigError, FerryError


def model(name: str) -> Iterator[Finding]:
    """Loads one layer, and digests the files of all."""
    import psutil

    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.probe import describe
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.node.calibrations import calibration_folder
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    try:
        loaded = load_model(name, layers=(0, 1))
        shape = describe(loaded.model, loaded.config)
        digests = fingerprint(loaded, (0, shape.all_layers), cache_dir=user_dir("cache"))
    except FerryError as exc:
        remedy = "--model takes smollm2, a folder with a model, or a hub id"
        yield Finding("model", FAIL, str(exc), remedy)
        return
    identity = model_id(digests)
    weights = sum(file.stat().st_size for file in loaded.weight_files)
    free = psutil.virtual_memory().available
    text = (
        f"{name}: id {identity.hex()[:16]}, {shape.all_layers} layers, {size(weights)} of weights"
    )
    if weights > free:
        remedy = "close other programs, or shard it over more machines"
        yield Finding("model", WARN, f"{text}, and {size(free)} of memory are free", remedy)
    else:
        yield Finding("model", OK, text)
    folder = calibration_folder(user_dir("cache"), identity)
    try:
        found, _ = CalibrationSet.load(folder)
    except ConfigError:
        what = "none here: one of the cluster's is used, else one is made from live traffic"
        yield Finding("calibration", WARN, what, f"kvferry calibrate --model {name}")
    except CodecError as exc:
        remedy = f"rm -r {folder}, then kvferry calibrate --model {name}"
        yield Finding("calibration", FAIL, str(exc), remedy)
    else:
        yield Finding("calibration", OK, f"{found.id.hex()[:16]} from {found.tokens:,} tokens")
