#!/usr/bin/env python
"""Names regions of photos and videos. README.md in this folder has examples."""

import sys

from regionspot_cli import main

if __name__ == "__main__":
    sys.exit(main(["name", *sys.argv[1:]]))
