"""`lowrank` in the torch world: calibrated on a torch model, in caches, presets and stores."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_samples import SALT, greedy, prefilled, prompt, tiny, tokenizer
from store_process import running

from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.codec.calibration import CalibrationSet, GroupEntry
from kvferry.codec.lowrank_calibration import RMS_NORM, LowRankCalibration
from kvferry.codec.raw import RawCodec
from kvferry.codec.registry import make_codec
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
    IdentityMismatchError,
    UnsupportedTensorError,
)
from kvferry.hf import (
    CompressedCache,
    PrefixCache,
    TorchModel,
    adopt,
    calibrate_lowrank,
    identify,
    offload,
    restore,
)
from kvferry.hf.calibrations import AtHand, by_layer
from kvferry.hf.compressed_layer import CompressedLayer
from kvferry.hf.history import EncodedHistory
from kvferry.hf.lowrank_history import LowRankHistory

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model() -> TorchModel:
    return identify(tiny(), tokenizer())


@pytest.fixture(scope="module")
def known(model: TorchModel) -> LowRankCalibration:
    return calibrate_lowrank(tiny(), model, prompt(1500, 77), "random", sequence=500)


def folder_of(known: LowRankCalibration, folder: Path) -> Path:
    entry = GroupEntry(known.id, known.layers, known.heads)
    CalibrationSet(model_id=known.model_id, model_layers=3, model_heads=2, groups=(entry,)).save(
        folder, [known]
    )
    return folder


def coded(known: LowRankCalibration, **options: object) -> CompressedCache:
    cuts = by_layer([known])
    codecs = {layer: make_codec("lowrank", options, cut) for layer, cut in cuts.items()}
    return CompressedCache(codecs, chunk=32, window=16, calibrations=AtHand(cuts.values()))


def test_a_calibration_of_a_torch_model_says_what_it_saw(
    model: TorchModel, known: LowRankCalibration
) -> None:
    assert (known.layers, known.heads, known.model_id) == ((0, 3), (0, 2), model.model_id)
    assert known.norm == RMS_NORM
    assert known.tokens == 1500 - 3 * 4  # without the first ones of each sequence
    assert known.bases["v"].vectors.shape == (3, 2, 16, 16)


def test_rank_and_bits_are_what_is_held_and_what_is_lost(known: LowRankCalibration) -> None:
    live, tokens = tiny(), prompt(400)
    plain = prefilled(live, tokens)
    held, errors = [], []
    for options in ({"rank": 16}, {"rank": 8}, {"rank": 8, "bits": 8}):
        cache = coded(known, **options)
        prefilled_into = prefill(live, tokens, cache)
        for mine, theirs in zip(prefilled_into.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)  # V only, by default
            assert torch.equal(mine.values[:, :, :4], theirs.values[:, :, :4])
        lost = [
            float((m.values - t.values).norm() / t.values.norm())
            for m, t in zip(prefilled_into.layers, plain.layers, strict=True)
        ]
        held.append(cache.nbytes)
        errors.append(max(lost))
    assert held[0] > held[1] > held[2]
    assert errors[0] < 1e-3 < errors[1] <= errors[2] * 1.001 < 1


def prefill(live: object, tokens: list[int], cache: CompressedCache) -> object:
    with torch.no_grad():
        live(torch.tensor([tokens]), past_key_values=cache)
    return cache.to_dynamic()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_it_is_what_the_codec_makes_of_it(
    bits: int, dtype: torch.dtype, known: LowRankCalibration
) -> None:
    part = known.cut((1, 2), known.heads)
    codec = make_codec("lowrank", {"rank": 9, "bits": bits}, part)
    both = (
        CompressedLayer(partial(LowRankHistory, codec), 32, 16),
        CompressedLayer(partial(EncodedHistory, 1, codec, AtHand([part])), 32, 16),
    )
    made = torch.Generator().manual_seed(4)

    def more(tokens: int) -> None:
        # the codec's exact parts are float16 where a cache is float32
        keys, values = (
            torch.randn(2, 2, tokens, 16, generator=made).half().to(dtype) for _ in range(2)
        )
        seen = [layer.update(keys, values) for layer in both]
        assert torch.equal(seen[0][0], seen[1][0])
        gap = float((seen[0][1].float() - seen[1][1].float()).abs().max())
        assert gap < 2e-2 if dtype is torch.bfloat16 else gap < 2e-3

    def each(call: str, *arguments: object) -> None:
        for layer in both:
            getattr(layer, call)(*arguments)
        assert both[0].get_seq_length() == both[1].get_seq_length()

    more(100)
    more(30)
    each("crop", -60)
    more(80)
    each("batch_repeat_interleave", 2)
    each("batch_select_indices", torch.tensor([3, 0]))
    each("reorder_cache", torch.tensor([1, 1]))
    more(1)
    each("crop", -(both[0].get_seq_length() - 3))  # among the exact first ones
    more(70)
    each("crop", -both[0].get_seq_length())
    more(70)
    with pytest.raises(UnsupportedTensorError, match="NaN"):
        both[0].update(*(torch.full((2, 2, 70, 16), float("nan"), dtype=dtype),) * 2)


@pytest.mark.parametrize("target", ["v", "kv"])
def test_a_codec_of_the_whole_model_is_cut_to_each_layer(
    target: str, known: LowRankCalibration
) -> None:
    live, tokens = tiny(), prompt(200)
    options = {"rank": 9, "target": target, "identity": "2"}
    whole = make_codec("lowrank", options, known)
    caches = [CompressedCache(whole, chunk=32, window=16), coded(known, **options)]
    mine, theirs = (prefill(live, tokens, cache) for cache in caches)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    exact = prefilled(live, tokens).layers
    assert torch.equal(mine.layers[2].values, exact[2].values)
    assert not torch.equal(mine.layers[1].values, exact[1].values)


@pytest.mark.parametrize("target", ["v", "kv"])
def test_codecs_of_other_layers_or_heads_are_refused(
    target: str, known: LowRankCalibration
) -> None:
    tokens, options = prompt(100), {"rank": 9, "target": target}
    cuts = [make_codec("lowrank", options, cut) for cut in by_layer([known]).values()]
    swapped = CompressedCache({0: cuts[1], 1: cuts[0], 2: cuts[2]}, chunk=32, window=16)
    with pytest.raises(ConfigError, match=r"layers 1 to 1.*calibrated for layer 0"):
        prefill(tiny(), tokens, swapped)
    with pytest.raises(ConfigError, match=r"layers 0 to 0.*calibrated for layer 1"):
        prefill(tiny(), tokens, CompressedCache(cuts[0], chunk=32, window=16))
    for other in ({"head_dim": 32}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}):
        cache = CompressedCache(dict(enumerate(cuts)), chunk=32, window=16)
        with pytest.raises(UnsupportedTensorError, match="calibrat"):
            prefill(tiny(**other), tokens, cache)


def test_generation_over_all_directions_is_the_exact_one(known: LowRankCalibration) -> None:
    live, tokens = tiny(), prompt(200)
    cache = coded(known, rank=16)
    assert greedy(live, tokens, cache) == greedy(live, tokens)
    assert sum(layer.nbytes[0] for layer in cache.layers) > 0


def test_a_preset_makes_the_cache(known: LowRankCalibration, tmp_path: Path) -> None:
    live, tokens = tiny(), prompt(200)
    folder_of(known, tmp_path / "calibration")
    preset = tmp_path / "preset.json"
    fields = {"model": "tiny", "rank": 16, "target": "v", "bits": 16, "ppl_delta": 0.01}
    fields |= {"calibration_file": "calibration", "identity": "0-1", "head_dim": 16}
    preset.write_text(json.dumps(fields))
    cache = CompressedCache.from_preset(preset, chunk=32, window=16)
    assert greedy(live, tokens, cache) == greedy(live, tokens)
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == ["DynamicLayer", "CompressedLayer", "CompressedLayer"]
    assert cache.layers[1].nbytes[0] > 0
    single = tmp_path / "calibration" / f"{known.id.hex()}.kvferry"
    other = CompressedCache.from_preset(preset, single, chunk=32, window=16)
    assert greedy(live, tokens, other) == greedy(live, tokens)


def test_a_preset_of_kvferry_tune_makes_the_cache(
    known: LowRankCalibration, tmp_path: Path
) -> None:
    from kvferry.codec.lab.preset import Preset, save_preset

    path = tmp_path / "preset.json"
    save_preset(Preset(model="tiny", model_id=bytes(32), codec="affine", options={"bits": 8}), path)
    live, tokens = tiny(), prompt(300)
    cache = CompressedCache.from_preset(path, chunk=32, window=16)
    prefill(live, tokens, cache)
    assert cache.layers[2].nbytes[0] > 0
    lossy = Preset(model="tiny", model_id=bytes(32), codec="lowrank", options={"rank": 8})
    save_preset(lossy, path)
    with pytest.raises(ConfigError, match="calibrat"):
        CompressedCache.from_preset(path)
    file = folder_of(known, tmp_path / "calibration") / f"{known.id.hex()}.kvferry"
    fields = {"rank": 8, "calibration_file": str(file.relative_to(tmp_path))}
    path.write_text(json.dumps(lossy.to_json() | fields))
    cache = CompressedCache.from_preset(path, chunk=32, window=16)
    prefill(live, tokens, cache)
    assert cache.layers[2].nbytes[0] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[]", "with rank, target and bits"),
        ('{"rank": 8}', "calibration"),
        ('{"rank": 8, "calibration_file": 3}', "calibration_file"),
        ('{"rank": 8, "calibration_file": "nowhere"}', "kvferry calibrate"),
        (r'{"rank": 8, "calibration_file": "\u0000"}', "kvferry calibrate"),
        ('{"rank": 17, "calibration_file": "calibration"}', "1 to 16"),
        ('{"rank": 8, "bits": 4, "calibration_file": "calibration"}', "bits"),
    ],
)
def test_presets_that_cannot_be_say_why(
    text: str, said: str, known: LowRankCalibration, tmp_path: Path
) -> None:
    folder_of(known, tmp_path / "calibration")
    path = tmp_path / "preset.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        CompressedCache.from_preset(path)
    with pytest.raises(ConfigError, match="preset"):
        CompressedCache.from_preset(tmp_path / "none.json")


def test_blobs_of_it_come_back_where_the_calibration_is_to_be_had(
    model: TorchModel, known: LowRankCalibration, tmp_path: Path
) -> None:
    live, tokens = tiny(), prompt(500)
    cache = prefilled(live, tokens)
    codec = make_codec("lowrank", {"rank": 12}, known)
    blobs = offload(cache, tokens, codec, model, salt=SALT, tail=RawCodec())
    back = restore(blobs, model, calibrations=AtHand([known]))
    keys, wanted = (held.layers[0].keys[:, :, :256] for held in (back, cache))
    assert torch.equal(keys, wanted.half().float())
    lost = (back.layers[0].values - cache.layers[0].values).norm() / cache.layers[0].values.norm()
    assert 0 < float(lost) < 0.5
    with pytest.raises(CalibrationMissingError):
        restore(blobs, model)
    with running(tmp_path / "store") as store, SyncBlobStoreClient(store.address) as client:
        writer = PrefixCache(
            model,
            client,
            salt=SALT,
            codec=codec,
            calibrations=[known],
            tail=RawCodec(),
            cache_dir=tmp_path / "writer",
        )
        assert writer.offer(tokens, cache) > 0
        reader = PrefixCache(model, client, salt=SALT, cache_dir=tmp_path / "reader")
        restored, held = reader.restore([*tokens, 1])
        assert (held, reader.counters["restores"]) == (500, 1)
        assert torch.equal(restored.layers[2].values, back.layers[2].values)


def test_a_calibration_of_the_same_model_elsewhere_can_be_adopted(
    model: TorchModel, known: LowRankCalibration
) -> None:
    tokens = prompt(400)
    cache = prefilled(tiny(), tokens)
    foreign = replace(known, model_id=bytes(32))
    codec = make_codec("lowrank", {"rank": 16}, foreign)
    blobs = offload(cache, tokens, codec, model, salt=SALT)
    with pytest.raises(IdentityMismatchError, match="model"):
        restore(blobs, model, calibrations=AtHand([foreign]))
    mine = adopt(foreign, model)
    assert mine.id == known.id
    turned = identify(tiny(rope_theta=5000.0), None)
    with pytest.raises(IdentityMismatchError, match="rope"):
        adopt(foreign, turned)
    wide = identify(tiny(num_key_value_heads=4), None)
    with pytest.raises(IdentityMismatchError, match="heads"):
        adopt(foreign, wide)
