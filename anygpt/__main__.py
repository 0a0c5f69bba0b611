"""`python -m anygpt COMMAND …`, the same as `anygpt COMMAND …`."""

import sys

from anygpt.commands import main

if __name__ == "__main__":
    sys.exit(main())
