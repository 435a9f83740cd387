"""python -m bench COMMAND: what the scripts have learned, measured on folders of PNGs.

python -m bench parzen --samples runs/gan-mnist/sampled --data mnist      # log-likelihood (Goodfellow et al. 2014)
python -m bench digits --samples runs/cgan-mnist/sampled --data mnist     # which digits were drawn
"""

import argparse
import sys
from pathlib import Path

from bench import digits, parzen


def main(argv=None):
    """Run a command; bad input ends in one sentence and exit status 2."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda sentence: sys.exit(f"bench: {sentence}")
    parser.add_argument("command", choices=("parzen", "digits"), help="what to measure")
    parser.add_argument("--samples", type=Path, required=True, help="folder of PNGs")
    parser.add_argument("--data", choices=("toy", "mnist"), default="toy", help="what they should look like")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or is downloaded to")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="where the trained classifier is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    try:
        args = parser.parse_args(argv)
        {"parzen": parzen, "digits": digits}[args.command].run(args)
    except (SystemExit, OSError, RuntimeError) as error:
        if isinstance(getattr(error, "code", None), int):
            raise
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
