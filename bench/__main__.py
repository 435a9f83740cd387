"""python -m bench COMMAND: what the scripts have learned, measured on folders of PNGs or on runs.

python -m bench parzen --samples runs/gan-mnist/sampled --data mnist      # log-likelihood (Goodfellow et al. 2014)
python -m bench digits --samples runs/cgan-mnist/sampled --data mnist     # which digits were drawn
python -m bench figures gan                                               # data, G and D on a line (its Fig. 1)
python -m bench figures dcgan --run runs/dcgan-mnist --boxes boxes.json   # what D sees, what G forgets, a probe of D
"""

import argparse
import sys
from pathlib import Path

from bench import digits, figures_dcgan, figures_gan, parzen


def get_parser():
    """The commands; each has its own options, and puts the function that runs it into `run`."""

    def add(commands, name, run, text):
        parser = commands.add_parser(name, help=text, description=text)
        parser.error = fail
        parser.set_defaults(run=run)
        return parser

    def fail(sentence):
        sys.exit(f"bench: {sentence}")

    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    measures = [
        add(commands, "parzen", parzen.run, "log-likelihood of test digits under samples"),
        add(commands, "digits", digits.run, "which digits samples show"),
    ]
    figures = add(commands, "figures", None, "figures of the papers").add_subparsers(metavar="SCRIPT", required=True)
    one = add(figures, "gan", figures_gan.run, "data, G and D on a line while they learn")
    dcgan = add(figures, "dcgan", figures_dcgan.run, "guided back-propagation, forgetting and a probe, of a run")
    for measure in measures:
        measure.add_argument("--samples", type=Path, required=True, help="folder of PNGs")
        measure.add_argument("--data", choices=("toy", "mnist"), default="toy", help="what they should look like")
        measure.add_argument("--cache", type=Path, default=Path("data"), help="where the trained classifier is kept")
    dcgan.add_argument("--run", dest="folder", type=Path, required=True, help="run folder of dcgan.py")
    dcgan.add_argument("--data", choices=("toy", "mnist"), help="labelled digits (those of the run)")
    dcgan.add_argument("--boxes", type=Path, help="JSON file of boxes on samples, by number, whose content to forget")
    for figure in (one, dcgan):
        figure.add_argument("--seed", type=int, default=0, help="of training, or of the samples as in dcgan.py")
        figure.add_argument("--to", type=Path, default=Path("runs", "figures"), help="folder for the PNGs")
    for parser_of_digits in (*measures, dcgan):
        parser_of_digits.add_argument("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to")
        parser_of_digits.add_argument("--out", type=Path, help="JSON file for the result")
    return parser


def main(argv=None):
    """Run a command; bad input ends in one sentence and exit status 2."""
    try:
        args = get_parser().parse_args(argv)
        args.run(args)
    except (SystemExit, OSError, RuntimeError) as error:
        if isinstance(getattr(error, "code", None), int):
            raise
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
