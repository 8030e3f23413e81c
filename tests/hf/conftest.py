"""Tests of `kvferry.hf`: where torch is installed, and asked for (`make test-hf`)."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
