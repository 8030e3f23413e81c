"""Offers of prompts with images: which conversation goes on from which."""

from typing import Any, cast

from kvferry.node.offer import Offer
from kvferry.proto.keys import Medium, medium_digest


def offer(tokens: int, *images: tuple[int, bytes]) -> Offer:
    media = tuple(Medium(a, a + 4, medium_digest(a, a + 4, shown)) for a, shown in images)
    return Offer((7,) * tokens, cast("Any", None), media=media)


def test_a_longer_offer_takes_the_place_of_one_with_the_same_images_only() -> None:
    cat = offer(20, (8, b"cat"))
    assert offer(30, (8, b"cat"), (22, b"dog")).goes_on_from(cat)
    assert not offer(30, (8, b"dog")).goes_on_from(cat)
    assert not offer(30).goes_on_from(cat)
    assert not offer(10, (8, b"cat")).goes_on_from(cat)
    assert not cat.goes_on_from(offer(20))
