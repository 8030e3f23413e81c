"""The figures of ``kvferry bench cluster``, one module each."""
