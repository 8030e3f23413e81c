"""What another process of the same tiny model does: restore a prompt and go on."""

import json
import sys

from hf_samples import SALT, greedy, tiny, tokenizer

from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.hf import PrefixCache, identify


def main(address: str) -> None:
    tokens = json.loads(sys.stdin.read())
    model = tiny()
    with SyncBlobStoreClient(address) as client:
        prefix = PrefixCache(identify(model, tokenizer()), client, salt=SALT)
        cache, held = prefix.restore(tokens)
    answer = greedy(model, tokens, cache)
    print(json.dumps({"held": held, "answer": answer, "counters": prefix.counters}))


if __name__ == "__main__":
    main(sys.argv[1])
