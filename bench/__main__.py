"""Methods and folders of images, measured. Each command has its options: python -m bench tables --help

python -m bench                                                       # every method on its toy set, in one table
python -m bench tables losses --seeds 3                               # the papers' experiments, ours beside theirs
python -m bench compare --real DIR --samples ours=DIR theirs=DIR      # your images beside others'
python -m bench study --real DIR --fake DIR                           # a page that asks people which images are real
python -m bench speed --scripts pix2pix --sizes paper                 # time of an update, share of the device's peak
python -m bench report                                                # README.md, RESULTS.md and a page, from results
python -m bench curves runs/gan-toy runs/dcgan-toy                    # loss curves as a PNG
python -m bench fcn --samples runs/pix2pix-toy/test                   # FCN-score of photos or labels
python -m bench parzen --samples runs/gan-mnist/sampled --data mnist  # log-likelihood (Goodfellow et al. 2014)
python -m bench digits --samples runs/cgan-mnist/sampled --data mnist # which digits were drawn
python -m bench shapes --run runs/text2img-toy                        # is drawn what sentences say
python -m bench figures gan                                           # data, G and D on a line (its Fig. 1)
python -m bench figures dcgan --run runs/dcgan-mnist                  # what D sees, and a probe of it
"""

import argparse
import importlib
import re
import sys

from bench.common import fail, write

COMMANDS = re.findall(r"^python -m bench (figures \w+|\w+)", __doc__, re.MULTILINE)


def main(argv=None):
    """Run a command: a module with `options(parser)` and `main(args)`. The row that it gives back is printed."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0].startswith("-"):
        argv = ["tables", "methods", "--seeds", "1", *argv]  # what there is to see without knowing any command
    words = 2 if argv[0] == "figures" else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        fail(f"there is no command {name}: there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"bench.{name.replace(' ', '_')}")
    parser = argparse.ArgumentParser(f"python -m bench {name}", description=module.__doc__.partition("\n\n")[0])
    parser.error = fail
    module.options(parser)
    args = parser.parse_args(argv[words:])
    try:
        if row := module.main(args):
            write(row, args.out)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
