"""python -m bench COMMAND: what the scripts have learned, measured on folders of PNGs or on runs.

python -m bench                                                           # every method on its toy set, in one table
python -m bench tables losses --seeds 3                                   # the papers' tables, ours beside theirs
python -m bench report                                                    # README.md's tables, and a page of all
python -m bench speed --scripts pix2pix --sizes paper                     # time of an update, and its floor
python -m bench fcn --samples runs/pix2pix-toy/test                       # what a segmentation network finds in photos
python -m bench parzen --samples runs/gan-mnist/sampled --data mnist      # log-likelihood (Goodfellow et al. 2014)
python -m bench digits --samples runs/cgan-mnist/sampled --data mnist     # which digits were drawn
python -m bench fid --samples runs/dcgan-mnist/sampled --data mnist       # KID, FID, precision, recall
python -m bench shapes --run runs/text2img-toy                            # is drawn what sentences say
python -m bench figures gan                                               # data, G and D on a line (its Fig. 1)
python -m bench figures dcgan --run runs/dcgan-mnist --boxes boxes.json   # what D sees, what G forgets, a probe of D
"""

import argparse
import sys

from bench import digits, fcn, fid, figures_dcgan, figures_gan, parzen, report, shapes, speed, tables

COMMANDS = {  # each module adds its options to a parser, and runs
    "tables": (tables, "the papers' tables: runs, judged, beside what the papers found"),
    "report": (report, "the tables of README.md, and a page with samples and curves, from results"),
    "speed": (speed, "time, FLOPs and bytes of an update of each script"),
    "fcn": (fcn, "FCN-score: what a segmentation network finds in photos, or the classes of label maps"),
    "parzen": (parzen, "log-likelihood of test digits under samples"),
    "digits": (digits, "which digits samples show"),
    "fid": (fid, "KID, FID, precision and recall of samples beside real images"),
    "shapes": (shapes, "how often a run of text2img.py draws what a sentence says"),
}
FIGURES = {
    "gan": (figures_gan, "data, G and D on a line while they learn"),
    "dcgan": (figures_dcgan, "guided back-propagation, forgetting and a probe, of a run"),
}


def fail(sentence):
    """Bad input ends in one sentence."""
    sys.exit(f"bench: {sentence}")


def get_parser():
    """The commands; each has its own options, and puts the function that runs it into `run`."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    figures = commands.add_parser("figures", help="figures of the papers")
    parser.error = figures.error = fail
    for group, modules in (
        (commands, COMMANDS),
        (figures.add_subparsers(metavar="SCRIPT", required=True), FIGURES),
    ):
        for name, (module, text) in modules.items():
            command = group.add_parser(name, help=text, description=text)
            command.error = fail
            command.set_defaults(run=module.run)
            module.options(command)
    return parser


def main(argv=None):
    """Run a command; bad input ends in one sentence and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["tables", "methods", "--seeds", "1", *argv]  # what there is to see without knowing any command
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
