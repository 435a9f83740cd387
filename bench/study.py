"""The perceptual study of Isola et al. (2017, Sec. 4): a page that asks people which of two images is generated.

    python -m bench study --real photos --fake runs/pix2pix-maps/test --study "map to photo" --method pix2pix.py

A real and a generated image are shown side by side for one second; then one says which was generated. Ten pairs are
for practice and tell what was right; forty are counted. In the end the page saves a JSON file. `python -m bench report`
adds up those in bench/results, or in another folder, and tables them beside the paper's numbers.
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
  const fooled = answers.filter(Boolean).length;
  show("text", `You took ${fooled} of ${answers.length} images for real. Please save the result and send it back.`);
  const result = {measure: "study", study: study.study, method: study.method, answers};
  const href = "data:application/json," + encodeURIComponent(JSON.stringify(result, null, 2) + "\\n");
  const download = "study-" + study.method.replace(/\\W+/g, "-") + "-" + Date.now() + ".json";
  show("buttons", make("a", {id: "result", textContent: "Save the result", href, download}));
}
document.getElementById("start").onclick = run;
</script></body></html>
"""


def fooled(answers):
    """How often people were fooled, and the share with its 95 % interval, of which Wilson's is for few answers too."""
    n, z = len(answers), 1.959963984540054
    share = sum(answers) / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return f"{sum(answers)} of {n}, {share:.1%} ({middle - half:.1%} to {middle + half:.1%})"


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
    add("--real", type=Path, required=True, help="folder of real images")
    add("--fake", type=Path, required=True, help="generated images; those of the same name are their partners")
    add("--study", default="", help='what is translated, such as "map to photo" or "photo to map"')
    add("--method", help="whose images they are (the name of the folder --fake)")
    add("--seed", type=int, default=0, help="of the choice of 50 pairs (%(default)s)")
    add("--out", type=Path, default="runs/study.html", help="the page (%(default)s)")


def main(args):
    """Write the page."""
    real, fake = find_images(args.real, "--real"), find_images(args.fake, "--fake")
    pairs = pick_pairs(real, fake, PRACTICE + TRIALS, args.seed)
    save(args.out, make_page(pairs, args.study, args.method or args.fake.resolve().name))
    print(f"wrote {args.out}: open it in a browser; each person saves a JSON file at its end")
