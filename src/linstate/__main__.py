"""``python -m linstate`` is the command ``linstate``."""

from linstate.cli import main

if __name__ == "__main__":
    main()
