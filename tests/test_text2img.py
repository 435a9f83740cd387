"""text2img.py against its papers: networks, losses, updates, captions and codes."""

import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, assert_refused, read_checkpoint, run_main
from torch.nn import functional as F

import text2img

ROW = next(row for row in ROWS if row.name == "text2img")


def count(net):
    """The number of its weights."""
    return sum(weight.numel() for weight in net.parameters())


def save_folder(path, names, captions=None):
    """Images of 20x20 pixels at path/NAME.png, each with captions(i) in NAME.txt if given."""
    for i, name in enumerate(names):
        file = path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)).save(file)
        if captions:
            file.with_suffix(".txt").write_text("\n".join(captions(i)))


def load(*flags):
    """What load_captions gives for those flags, and the settings."""
    args = ROW.args(*flags)
    return text2img.load_captions(args), args


def first_batches(args, data, codes, images_seen, count, monkeypatch):
    """The first batches from there on, with those codes (M, text) of all captions."""
    monkeypatch.setattr(text2img, "encode_captions", lambda E, said: codes)
    return [*itertools.islice(text2img.batches(args, None, data, images_seen), count)]


def test_weights():
    """The networks of the authors' code, to the last weight; without residual branches those of the paper's figure."""
    with torch.device("meta"):
        G, D, E = text2img.Generator(), text2img.Discriminator(), text2img.TextEncoder()
        bare = text2img.Generator(residual=False), text2img.Discriminator(residual=False)
        branches = [count(text2img.Residual(channels, torch.nn.ReLU())) for channels in (1024, 512)]
    assert (count(G), count(D), count(E)) == (18_909_699, 4_032_321, 1_814_144)
    assert [count(net) for net in bare] == [18_909_699 - sum(branches), 4_032_321 - branches[1]]


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_shapes(size):
    """Images of the size, one logit an image, and z from an image."""
    G, D = text2img.Generator(size, 8, 4, 5, 4), text2img.Discriminator(size, 8, 4, 4)
    x, t = G(torch.randn(3, 5), torch.randn(3, 8)), torch.randn(3, 8)
    assert x.shape == (3, 3, size, size) and x.abs().max() <= 1
    assert D(x, t).shape == (3,)
    assert text2img.StyleEncoder(size, 5, 4)(x).shape == (3, 5)
    assert text2img.ImageEncoder(size, 8, 16)(x).shape == (3, 8)


def test_initial_weights():
    """Convolutions N(0, .02) with zero biases; gains of batch norm N(1, .02); linear layers keep torch's."""
    torch.manual_seed(0)
    G = text2img.init_weights(text2img.Generator(32, 16, 16, 16, 32))
    for name, weight in G.layers.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        else:
            assert weight.mean().item() == pytest.approx(float(weight.ndim == 1), abs=0.01)
            assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert G.of_text[0].weight.abs().max() > 0.1


def test_text_encoder_reads_letters_in_order(capsys):
    """70 letters, with the hyphen twice; the later counts; letter n is one-hot, others 0; 201 are read in order."""
    assert len(text2img.ALPHABET) == 70 and text2img.ALPHABET.count("-") == 2
    sentences = ["aZ 9-é", "b" * 300]
    text2img.check_sentences(sentences)
    chars = text2img.spell(sentences)
    assert chars.shape == (2, 201) and chars.dtype == torch.uint8
    assert chars[0, :6].tolist() == [1, 26, 70, 36, text2img.ALPHABET.rindex("-") + 1, 0]
    assert not chars[0, 6:].any() and (chars[1] == 2).all()
    assert capsys.readouterr().out.count("cut after 201 characters") == 1
    torch.manual_seed(0)
    E, seen = text2img.TextEncoder(8, 8), []
    codes = E(text2img.spell(["red on blue", "blue on red"]))
    assert not torch.allclose(codes[0], codes[1])
    E.convs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    E(torch.arange(201).clamp(max=70)[None])
    assert not seen[0][0, :, 0].any() and torch.equal(seen[0][0, :, 1:71], torch.eye(70))


def test_losses_by_hand():
    """-log D and -log(1 - D); both directions of the hinge over pairs of unlike classes, over the batch."""
    logits = torch.tensor([0.0, math.log(3)])  # D = 1/2, 3/4
    assert text2img.gan_loss(logits, True).item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4)) / 2)
    assert text2img.gan_loss(logits, False).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 4)) / 2)
    images, texts = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[1.0, 0], [0.5, 1], [2, 0]])
    kinds, scores = [0, 1, 0], images @ texts.T
    pairs = [(i, j) for i in range(3) for j in range(3) if kinds[i] != kinds[j]]
    hinges = [max(0, scores[i, j] - scores[i, i] + 1) + max(0, scores[j, i] - scores[i, i] + 1) for i, j in pairs]
    assert text2img.sje_loss(images, texts, torch.tensor(kinds)).item() == pytest.approx(float(sum(hinges)) / 3)


@pytest.mark.parametrize("flags", ["", "--no-cls", "--no-int", "--no-cls --no-int"])
def test_update(flags):
    """D follows log s_r + (log(1 - s_w) + log(1 - s_f)) / 2, G log s_f, both from where they were, and nothing else."""
    args = ROW.args(*flags.split())
    state, (x, t, wrong) = text2img.build(args), ROW.batch(args)
    G, D = deepcopy(state["G"]), deepcopy(state["D"])
    before = {name: deepcopy(state[name].state_dict()) for name in "EVS"}
    torch.manual_seed(0)
    losses = text2img.make_step(args, state)(x, t, wrong)
    torch.manual_seed(0)
    asked = t if args.no_int else torch.cat([t, (t[:2] + t[2:]) / 2])
    fake = G(torch.randn(2 * len(asked), args.nz), asked.repeat_interleave(2, 0))  # two of each sentence
    fake = torch.cat([fake[::2], fake[1::2]], 1)
    pairs = [(x, t)] + [(x, wrong)] * (not args.no_cls) + [(fake, asked)]
    features = {id(images): D.of_x(images) for images in (x, fake)}
    joined = D.match(torch.cat([features[id(images)] for images, _ in pairs]), torch.cat([code for _, code in pairs]))
    right, fakes = joined[:4], joined[-len(asked) :]
    expected = {"loss_right": F.softplus(-right).mean(), "loss_fake": F.softplus(fakes[:4]).mean()}
    expected["loss_wrong"] = expected["loss_fake"] if args.no_cls else F.softplus(joined[4:8]).mean()
    expected["loss_G"] = F.softplus(-fakes).mean()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-4
    )
    loss_D = expected["loss_right"] + (expected["loss_wrong"] + expected["loss_fake"]) / 2
    for name, net, loss in (("D", D, loss_D), ("G", G, expected["loss_G"])):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for grad, weight in zip(grads, state[name].parameters(), strict=True):
            torch.testing.assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(part, before[name][key]) for name in "EVS" for key, part in state[name].state_dict().items())


def test_text_and_style_steps():
    """The text step moves E and V alone, the style step S alone, by |z - S(G(z, t))|^2 with G as it draws."""
    args = ROW.args()
    state, (x, t, _) = text2img.build(args), ROW.batch(args)
    before = {name: deepcopy(state[name].state_dict()) for name in "EVGDS"}

    def moved():
        return {n for n in "EVGDS" if any(not torch.equal(w, before[n][k]) for k, w in state[n].state_dict().items())}

    chars = text2img.spell(["a red bird", "a blue bird", "two birds", "none"])
    text2img.make_text_step(args, state)(x[:, :3], chars, torch.arange(4))
    assert moved() == {"E", "V"}
    G, S = deepcopy(state["G"]).eval(), deepcopy(state["S"])
    torch.manual_seed(5)
    loss = text2img.make_style_step(args, state)(t)["loss_S"]
    torch.manual_seed(5)
    z = torch.randn(4, args.nz)
    assert loss.item() == pytest.approx((S(G(z, t)) - z).square().mean().item(), rel=1e-4)
    assert moved() == {"E", "V", "S"}


def test_phases_and_schedules(tmp_path):
    """E, then the GAN, then S; the rate of G and D halves, that of E falls by 2 percent a pass, each in its phase."""
    save_folder(tmp_path / "set", ["a", "b", "c", "d"], lambda i: [f"number {i}"])  # a pass is an update
    flags = f"{ROW.tiny} --data {tmp_path}/set --out {tmp_path}/run --text-epochs 3 --epochs 5 --style-epochs 1".split()
    rates, last, moved = [], {"E": 0, "D": 0, "S": 0}, []
    for step in range(1, 10):
        assert run_main(ROW, *flags, *"--halve-every 2 --lr 1e-3 --text-lr 1e-3 --max-steps".split(), step) == 0
        saved = read_checkpoint(tmp_path / "run")
        sums = {name: sum(part.double().sum() for part in saved[name].values()) for name in last}
        moved.append("".join(name for name in last if sums[name] != last[name]))
        rates.append([float(saved[name]["param_groups"][0]["lr"]) for name in ("opt_E", "opt_G", "opt_D")])
        last = sums
    assert moved[1:] == ["E", "E", "ED", "D", "D", "D", "D", "S"]  # E gets the mean of all codes when the GAN begins
    assert [rate[0] for rate in rates[:3]] == pytest.approx([1e-3, 0.98e-3, 0.9604e-3])
    assert [rate[1:] for rate in rates[3:8]] == [pytest.approx([1e-3 / 2 ** (i // 2)] * 2) for i in range(5)]
    picture = Image.open(tmp_path / "run" / "samples" / "0000009.png")
    assert picture.size == (
        (1 + 12 + 4) * 130 + 2,
        (1 + 4) * 130 + 2 + 20,
    )  # four sentences in the style of four images


def test_held_out_combinations():
    """No combination is in both parts."""
    seen, held = (text2img.shapes(3000, 0, held_out=part, size=8)[2] for part in (False, True))
    seen, held = ({tuple(label) for label in labels.tolist()} for labels in (seen, held))
    forms, inks, sizes, grounds = map(len, text2img.VALUES)
    assert held and not seen & held and len(seen | held) == forms * inks * sizes * grounds


def test_toy_captions_tell_the_truth():
    """Each of five captions names form, size and both colours; the images show them."""
    images, captions, labels = text2img.shapes(200, 1, size=64)
    forms, names, _, grounds = text2img.VALUES
    sizes = ({"small", "little", "tiny"}, {"large", "big", "huge"})
    for said, (form, ink, large, ground) in zip(captions, labels.tolist()):
        assert len({*said}) == 5
        for words in (line.replace(",", "").split() for line in said):
            assert {forms[form], names[ink], grounds[ground]} <= {*words}
            assert sizes[large] & {*words} and not sizes[1 - large] & {*words}
    colors = torch.tensor([*text2img.GROUNDS.values()]).float()
    edge = images[..., [0, -1]].float().mean(3)  # of each row
    assert torch.cdist(edge.mean(2), colors).argmin(1).eq(labels[:, 3]).all()
    covered = (images.float() - edge[..., None]).abs().amax(1).gt(60).float().mean((1, 2))
    assert covered[labels[:, 2] == 1].min() > covered[labels[:, 2] == 0].max()


@pytest.mark.parametrize(("near", "farthest"), [(1, math.inf), (1000, 1)])
def test_wrong_sentences_are_of_other_classes(near, farthest, monkeypatch):
    """A batch's own codes are of its images' captions, the wrong ones of another class, the nearest of --near."""
    data, args = load("--near", near)
    codes = torch.from_numpy(np.repeat(data.kinds, data.many)).float()[:, None].repeat(1, args.text)
    for phase, epoch, x, t, wrong in first_batches(args, data, codes, 0, 20, monkeypatch):
        assert (phase, epoch, x.shape) == (1, 1, (4, 6, 16, 16)) and t.shape == wrong.shape == (4, args.text)
        assert (wrong != t).all() and (wrong - t).abs().max() <= farthest


def test_codes(monkeypatch):
    """Each caption has E's code, less the mean of all, with a spread of 1; those of an image are averaged."""
    data, args = load("--average", 50)
    state = text2img.build(args)
    codes, some = text2img.encode_captions(state["E"], data.said), torch.tensor([0, 1, 7, 4999, 19999])
    torch.testing.assert_close(codes[some], text2img.encode(state["E"], data.said[some]), rtol=1e-4, atol=1e-4)
    assert codes.mean(0).abs().max() < 1e-3 and codes.std(0).mean().item() == pytest.approx(1, abs=1e-4)
    codes = torch.randn(len(codes), args.text)
    expected = torch.stack([codes[a : a + n].mean(0) for a, n in zip(data.first, data.many)])
    last = args.epochs * len(data.kinds)
    ((phase, epoch, t),) = first_batches(args, data, codes, last, 1, monkeypatch)
    assert (phase, epoch) == (2, args.epochs + 1)
    assert (torch.cdist(t, expected).amin(1) < torch.cdist(t, expected).median(1).values / 2).all()


def test_captions_of_a_folder(tmp_path, capsys):
    """NAME.txt beside NAME.png, one caption a line; folders are classes; the test split is left out, which is said."""
    names = ["birds/a", "birds/b", "dogs/c", "test/dogs/d"]
    save_folder(tmp_path / "set", names, lambda i: [f"number {i}", "", f"again {i}"])
    data, _ = load("--data", tmp_path / "set", "--data-root", tmp_path)
    assert data.kinds.tolist() == [0, 0, 1] and data.many.tolist() == [2, 2, 2] and data.first.tolist() == [0, 2, 4]
    assert torch.equal(data.said[2], text2img.spell(["number 1"])[0])
    assert data.pixels.shape == (3, 3, 19, 19) and "1 of test" in capsys.readouterr().out
    save_folder(tmp_path / "flat", ["a", "b"], lambda i: ["one"])  # each image is a class of its own
    assert load("--data", tmp_path / "flat")[0].kinds.tolist() == [0, 1]


BAD_CAPTIONS = (  # text in a.txt, what the sentence says
    (None, "a.txt"),
    (b"\n \n", "a.txt"),
    (b"\xff\xfe\x00bad", "a.txt"),
)


@pytest.mark.parametrize(("text", "says"), BAD_CAPTIONS)
def test_bad_captions(tmp_path, text, says):
    """What cannot be used as captions is named in one sentence."""
    save_folder(tmp_path / "set", ["a", "b"], lambda i: ["one"])
    file = tmp_path / "set" / "a.txt"
    file.write_bytes(text) if text else file.unlink()
    assert_refused(run_main(ROW, *ROW.tiny.split(), "--data", tmp_path / "set", "--out", tmp_path / "run"), says)


def test_captions_without_letters(tmp_path, capsys):
    """They are counted, and refused where no caption has a letter."""
    save_folder(tmp_path / "set", ["a", "b", "c"], lambda i: ["红色的鸟, 。", ["blue", "2", "。"][i]])
    load("--data", tmp_path / "set")
    assert "4 sentences" in capsys.readouterr().out
    save_folder(tmp_path / "set", ["a", "b", "c"], lambda i: ["红色的鸟, 。"])
    assert_refused(run_main(ROW, *ROW.tiny.split(), "--data", tmp_path / "set"), "红色的鸟")
    save_folder(tmp_path / "two", ["a", "b"], lambda i: [f"a {'猫狗'[i]}"])
    assert_refused(run_main(ROW, *ROW.tiny.split(), "--data", tmp_path / "two"), "a 猫")


GOOD_ROW = '{"file": "a.png", "caption": "one"}\n'
BAD_ROWS = (
    '{"file": "a.png", "captions": "a red bird"}',
    '{"file": "a.png", "captions": [1]}',
    "a.png: one",
    '{"file": 1}',
)


def test_captions_in_one_file(tmp_path, capsys):
    """captions.jsonl: rows of one image are added up; a bad line is named by its number; others need a .txt."""
    save_folder(tmp_path, ["train/a", "train/b"])
    file, flags = tmp_path / "train" / "captions.jsonl", ["--data", tmp_path, "--data-root", tmp_path / "data"]
    more = '{"file": "a.png", "captions": ["two", "three"]}\n{"file": "c.png", "caption": "none"}\n'
    file.write_text("\ufeff" + GOOD_ROW + more)
    assert_refused(run_main(ROW, *ROW.tiny.split(), *flags), "b.txt")
    (tmp_path / "train" / "b.txt").write_text("four")
    data, _ = load(*flags)
    assert torch.equal(data.said, text2img.spell(["one", "two", "three", "four"])) and data.many.tolist() == [3, 1]
    assert "captions of 1 files that are not there" in capsys.readouterr().out
    for bad in BAD_ROWS:
        file.write_text(GOOD_ROW + bad)
        assert_refused(run_main(ROW, *ROW.tiny.split(), *flags), "line 2")


def test_other_captions_are_refused(tmp_path):
    """A run belongs to its captions, too."""
    save_folder(tmp_path / "set", ["a", "b"], lambda i: ["one"])
    flags = [*ROW.tiny.split(), "--data", tmp_path / "set", "--out", tmp_path / "run", "--max-steps"]
    assert run_main(ROW, *flags, 1) == 0
    (tmp_path / "set" / "a.txt").write_text("another")
    assert_refused(run_main(ROW, *flags, 2), "other images")


def test_prompts(tmp_path):
    """A file of sentences: N images of each, numbered by sentence; the same seed draws the same, another not."""
    run, asked, empty = tmp_path / "run", tmp_path / "asked", tmp_path / "empty.txt"
    assert run_main(ROW, *ROW.tiny.split(), "--out", run, "--max-steps", 1) == 0
    asked.write_text("a red circle\n\na blue bar\n")  # whatever its ending
    empty.write_text("\n\n")
    for to, seed in (("one", 0), ("two", 0), ("three", 1)):
        flags = "--out", run, "--sample", 2, "--device", "cpu", "--to", tmp_path / to, "--seed", seed, "--prompt"
        assert run_main(ROW, *flags, asked) == 0
    names = [file.name for file in sorted((tmp_path / "one").glob("*.png"))]
    assert names == [f"{i:05}.png" for i in range(4)]
    pictures = [(tmp_path / to / names[0]).read_bytes() for to in ("one", "two", "three")]
    assert pictures[0] == pictures[1] != pictures[2]
    for bad in (empty, "", "   ", "红色的圆", "missing.txt"):
        assert_refused(run_main(ROW, *flags, bad), str(bad))


def test_class_names_as_captions(tmp_path, capsys):
    """Without NAME.txt the name of the folder is the sentence, which is said; without a folder that is refused."""
    for name in ("daisy/0", "daisy/1", "tulip/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    flags = ["--size", "16", "--load-size", "19", "--device", "cpu", "--data-root", str(tmp_path / "data"), "--data"]
    _, captions, _ = text2img.read_folder(text2img.get_args([*flags, str(tmp_path)]))
    assert (
        captions == [["a daisy"], ["a daisy"], ["a tulip"]] and "3 images have no captions" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="0.txt"):
        text2img.read_folder(text2img.get_args([*flags, str(tmp_path / "daisy")]))
