"""One fault by hand: ``python tests/faults/by_hand.py NAME [exact|default]``; no name: a list."""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from faults_harness import Hook, Site, small_model  # noqa: E402
from faults_scenarios import DAILY, QUEUE_BYTES, RARE, queue_full  # noqa: E402


def main() -> int:
    """See the module."""
    known = {scenario.__name__: scenario for scenario in (*DAILY, *RARE, queue_full)}
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        for name, scenario in known.items():
            print(f"{name:22} {(scenario.__doc__ or '').splitlines()[0]}")
        return 2
    scenario = known[sys.argv[1]]
    policy = sys.argv[2] if len(sys.argv) > 2 else "exact"
    options = {"n0": ("--upload-queue-bytes", str(QUEUE_BYTES))} if scenario is queue_full else {}
    with tempfile.TemporaryDirectory(prefix="kvf-") as made:
        folder = Path(made)
        os.environ["XDG_STATE_HOME"] = str(folder)
        model, cache_dir = small_model(folder)
        hook = Hook(model, folder, cache_dir)
        try:
            with Site(folder, hook, policy, options) as site:
                started = time.monotonic()
                scenario(site)
                print(f"{scenario.__name__}: as it should be, {time.monotonic() - started:.1f} s")
                for service in (site.store, *site.nodes):
                    print(f"  {service.name}: {service.events()}")
        finally:
            hook.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
