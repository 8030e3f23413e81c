"""``python -m kvferry``: the same as the ``kvferry`` command."""

from kvferry.cli.main import main

if __name__ == "__main__":
    main()
