"""Tests of `kvferry.hf`: where torch is installed, and asked for (`make test-hf`)."""

import importlib.util
import sys
from pathlib import Path

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
sys.path.append(str(Path(__file__).parent.parent / "cluster"))  # store_process
