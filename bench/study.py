"""The perceptual study of Isola et al. (2017, Sec. 4): a page that asks people which of two images is generated.

    python -m bench study --real photos --fake runs/pix2pix-maps/test --study "map to photo" --method pix2pix.py
    python -m bench study --results anna.json ben.json

A real and a generated image are shown side by side for one second; then one says which was generated. Ten pairs are
for practice and tell what was right; forty are counted. In the end the page saves a JSON file, which `python -m bench
report` tables, if it lies in bench/results, beside the papers' numbers: `study` and `method`, the counted `trials`, in
`answers` for each of them whether the real image was taken for the generated one, how often that was so (`fooled`), its
`share`, and `low` and `high`, the ends of Wilson's 95 % interval of a binomial share.
"""

import json
import math
import random
from pathlib import Path

from PIL import Image

from bench.common import data_uri, fail, find_images, read_image, save

PRACTICE, TRIALS = 10, 40
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Which image is generated?</title><style>
body { font: 18px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; text-align: center; }
#pair { display: flex; justify-content: center; gap: 2rem; min-height: 20rem; }
#pair img { width: 20rem; height: 20rem; object-fit: contain; image-rendering: pixelated; }
button { font: inherit; padding: .6rem 2rem; margin: .5rem; }
</style></head><body><h1>Which image is generated?</h1>
<p id="text">Two images are shown for one second: a real one, and one that a computer made. Then say which one the
computer made. The first PRACTICE pairs are for practice; TRIALS pairs follow.</p>
<div id="pair"></div><div id="buttons"><button id="start">Start</button></div>
<script>
const study = STUDY, answers = [];
const show = (id, ...parts) => document.getElementById(id).replaceChildren(...parts);
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const make = (kind, about) => Object.assign(document.createElement(kind), about);

function shareFooled(answers) {  // the same as share_fooled in bench/study.py
  const n = answers.length, share = answers.filter(Boolean).length / n, z = 1.959963984540054;
  const middle = (share + z * z / (2 * n)) / (1 + z * z / n);
  const half = z / (1 + z * z / n) * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  return [share, middle - half, middle + half];
}

async function ask(pair) {  // whether the real image is taken for the generated one
  const realSide = Math.random() < 0.5 ? 0 : 1;  // 0 is left
  const images = [realSide, 1 - realSide].map(kind => make("img", {src: pair[kind], alt: ""}));
  await Promise.all(images.map(image => image.decode()));
  show("buttons");
  show("pair", ...images);
  await wait(1000);
  show("pair");
  return new Promise(done => show("buttons", ...["Left", "Right"].map((name, side) =>
    make("button", {textContent: name + " was generated", onclick: () => done(side === realSide)}))));
}

async function run() {
  const order = study.pairs.map(pair => [Math.random(), pair]).sort((a, b) => a[0] - b[0]);
  for (const [i, [, pair]] of order.entries()) {
    const practice = i < study.practice;
    show("text", practice ? `Practice ${i + 1}` : `Pair ${i + 1 - study.practice}`);
    const fooled = await ask(pair);
    if (practice) {
      show("buttons");
      show("text", fooled ? "No, that was the real one." : "Right.");
      await wait(1000);
    } else answers.push(fooled);
  }
  const [share, low, high] = shareFooled(answers), trials = answers.length, fooled = answers.filter(Boolean).length;
  const numbers = {trials, fooled, share, low, high, answers};
  const result = {measure: "study", study: study.study, method: study.method, ...numbers};
  const percent = number => (100 * number).toFixed(1) + " %";
  show("text", `You took ${fooled} of ${trials} images for real: ${percent(share)}, 95 % interval ${percent(low)} to ` +
    `${percent(high)}. Please save the result and send it back.`);
  const href = "data:application/json," + encodeURIComponent(JSON.stringify(result, null, 2) + "\\n");
  const download = "study-" + study.method.replace(/\\W+/g, "-") + "-" + Date.now() + ".json";
  show("buttons", make("a", {id: "result", textContent: "Save the result", href, download}));
}
document.getElementById("start").onclick = run;
</script></body></html>
"""


def share_fooled(answers):
    """The share of true answers, and the ends of Wilson's 95 % interval of a binomial share. -> share, low, high."""
    n, z = len(answers), 1.959963984540054
    share = sum(answers) / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return share, middle - half, middle + half


def read_result(path):
    """What the page has saved, if its numbers are those of its answers."""
    try:
        result = json.loads(path.read_text("utf-8"))
        answers = result["answers"]
        expected = [len(answers), sum(answers), *share_fooled(answers)]
        found = [result[name] for name in ("trials", "fooled", "share", "low", "high")]
        if not all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(found, expected)):
            raise ValueError("its share and interval are not those of its answers")
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        fail(f"--results {path} is no result of a study ({type(error).__name__}: {error})")
    return result


def pick_pairs(real, fake, count, seed):
    """Files of a real and a generated image for each of `count` pairs: of one name, if all are, else at random."""
    rng, pairs = random.Random(seed), [(real[name], fake[name]) for name in sorted(real.keys() & fake.keys())]
    if len(pairs) < len(fake):
        print("the names of real and generated images differ: pairs are made at random")
        few = min(len(real), len(fake))
        pairs = [*zip(rng.sample([*real.values()], few), rng.sample([*fake.values()], few))]
    if len(pairs) < count:
        fail(f"--real and --fake have {len(pairs)} pairs of images: {count} are shown")
    return rng.sample(pairs, count)


def make_page(pairs, study, method):
    """The page as text, with all images in it; a real image is resized to the size of its partner."""
    shown = []
    for real, fake in pairs:
        image = read_image(fake)
        partner = read_image(real).resize(image.size, Image.Resampling.BICUBIC)
        shown.append([data_uri(partner.save), data_uri(image.save)])
    about = {"study": study, "method": method, "practice": PRACTICE, "pairs": shown}
    text = PAGE.replace("PRACTICE", str(PRACTICE)).replace("TRIALS", str(TRIALS))
    return text.replace("STUDY", json.dumps(about).replace("<", "\\u003c"), 1)


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--real", type=Path, help="folder of real images")
    add("--fake", type=Path, help="folder of generated images; those of the same name are their partners")
    add("--study", default="", help='what is translated, such as "map to photo" or "photo to map"')
    add("--method", help="whose images they are (the name of the folder --fake)")
    add("--seed", type=int, default=0, help="of the choice of 50 pairs (%(default)s)")
    add("--out", type=Path, default="runs/study.html", help="the page (%(default)s)")
    add("--results", type=Path, nargs="+", metavar="FILE", help="what the page has saved: print each, and all together")


def main(args):
    """Write the page, or print what people answered."""
    if args.results:
        answers = {path.name: read_result(path)["answers"] for path in args.results}
        for name, some in {**answers, "all together": sum(answers.values(), [])}.items():
            print("{}: {} of {}, {:.1%} ({:.1%} to {:.1%})".format(name, sum(some), len(some), *share_fooled(some)))
        return
    if not args.real or not args.fake:
        fail("give --real and --fake, two folders of images, or --results")
    real, fake = find_images(args.real, "--real"), find_images(args.fake, "--fake")
    pairs = pick_pairs(real, fake, PRACTICE + TRIALS, args.seed)
    save(args.out, make_page(pairs, args.study, args.method or args.fake.resolve().name))
    print(f"wrote {args.out}: open it in a browser; each person saves a JSON file at its end")
