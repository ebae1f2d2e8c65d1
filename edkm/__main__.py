"""The door of the command line: `python -m edkm`."""

import sys

from integrations.commands import main

if __name__ == "__main__":
    sys.exit(main())
