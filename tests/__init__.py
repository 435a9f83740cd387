"""A package, so that `python -m tests.torture` finds this folder and not what others install under its name."""

import sys
from pathlib import Path

if (folder := str(Path(__file__).parent)) not in sys.path:  # for `import scripts`, whoever imports this first
    sys.path.insert(0, folder)
