"""text2img.py against its papers: networks, losses, updates, captions and codes."""

import json
import math
import os
import pickle
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


def folder_of(path, names, captions=None):
    """Images of 20x20 pixels at path/NAME.png, each with captions(i) in NAME.txt if given."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        file = path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file)
        if captions:
            file.with_suffix(".txt").write_text("\n".join(captions(i)))


def data_of(*flags):
    """What load_data gives for those flags, and the settings."""
    args = ROW.args(*flags)
    return text2img.load_data(args), args


# -- networks --------------------------------------------------------------------------------------------------------


def test_weights():
    """The networks of the authors' code, to the last weight."""
    with torch.device("meta"):
        assert count(text2img.Generator()) == 18_909_699
        assert count(text2img.Discriminator()) == 4_032_321
        assert count(text2img.TextEncoder()) == 1_814_144


def test_weights_without_residual_branches():
    """Without them, what the paper's figure shows: the branches are all that is left out."""
    branch = [count(text2img.Residual(c, torch.nn.ReLU())) for c in (1024, 512)]
    assert count(text2img.Generator(residual=False)) == 18_909_699 - sum(branch)
    assert count(text2img.Discriminator(residual=False)) == 4_032_321 - branch[1]


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
    convs = [part for part in G.modules() if isinstance(part, torch.nn.ConvTranspose2d)]
    assert all(conv.weight.std().item() == pytest.approx(0.02, rel=0.1) for conv in convs)
    assert all(not conv.bias.any() for conv in convs)
    gains = torch.cat([part.weight for part in G.modules() if isinstance(part, torch.nn.BatchNorm2d)])
    assert gains.mean().item() == pytest.approx(1, abs=0.01) and gains.std().item() == pytest.approx(0.02, rel=0.3)
    assert G.of_text[0].weight.abs().max() > 0.1


def test_alphabet():
    """70 letters, of which the hyphen is there twice; the later counts; others and the padding are 0."""
    assert len(text2img.ALPHABET) == 70 and text2img.ALPHABET.count("-") == 2
    chars = text2img.spelled(["aZ 9-é", "b" * 300])
    assert chars.shape == (2, 201) and chars.dtype == torch.uint8
    assert chars[0, :6].tolist() == [1, 26, 70, 36, text2img.ALPHABET.rindex("-") + 1, 0]
    assert not chars[0, 6:].any() and (chars[1] == 2).all()


def test_letters_are_one_hot():
    """Letter n lights up row n - 1 and nothing else; 0 none."""
    letters = text2img.TextEncoder(8, 8).letters
    assert letters.shape == (71, 70) and not letters[0].any()
    assert torch.equal(letters[1:], torch.eye(70))


def test_text_encoder_reads_the_order():
    """The same letters in another order have another code."""
    torch.manual_seed(0)
    codes = text2img.TextEncoder(8, 8)(text2img.spelled(["red on blue", "blue on red"]).long())
    assert not torch.allclose(codes[0], codes[1])


# -- losses and updates ----------------------------------------------------------------------------------------------


def test_gan_loss():
    """-log D and -log(1 - D), by hand."""
    logits = torch.tensor([0.0, math.log(3)])  # D = 1/2, 3/4
    assert text2img.gan_loss(logits, True).item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4)) / 2)
    assert text2img.gan_loss(logits, False).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 4)) / 2)


def test_sje_loss_by_hand():
    """Both directions of the hinge over pairs of unlike classes, over the batch."""
    images, texts = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[1.0, 0], [0.5, 1], [2, 0]])
    kinds, expected = [0, 1, 0], 0.0
    scores = images @ texts.T
    for i in range(3):
        for j in range(3):
            if kinds[i] != kinds[j]:
                expected += max(0, scores[i, j] - scores[i, i] + 1) + max(0, scores[j, i] - scores[i, i] + 1)
    assert text2img.sje_loss(images, texts, torch.tensor(kinds)).item() == pytest.approx(float(expected) / 3)
    assert expected > 0


def updated(flags, seed=0):
    """Settings, state before and after one update, the batch and the losses."""
    args = ROW.args(*flags.split())
    state, batch = text2img.build(args), ROW.batch(args)
    before = {name: deepcopy(part.state_dict()) for name, part in state.items()}
    torch.manual_seed(seed)
    losses = text2img.make_step(args, state)(*batch)
    return args, before, state, batch, losses


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("between", [True, False])
def test_losses_of_the_four_methods(cls, between):
    """Each term from the networks as they were, all pairs in one pass of D's joint half."""
    flags = ("" if cls else "--no-cls ") + ("" if between else "--no-int")
    args, before, state, (x, t, wrong), losses = updated(flags)
    for name in "GD":
        state[name].load_state_dict(before[name])
    G, D = state["G"], state["D"]
    torch.manual_seed(0)
    asked = torch.cat([t, (t[:2] + t[2:]) / 2]) if between else t
    fake = G(torch.randn(len(asked), args.nz), asked)
    pairs = [(x, t)] + [(x, wrong)] * cls + [(fake, asked)]
    features = {id(images): D.of_x(images) for images in (x, fake)}
    joined = D.match(torch.cat([features[id(images)] for images, _ in pairs]), torch.cat([code for _, code in pairs]))
    parts = joined.split([len(code) for _, code in pairs])
    fakes = parts[-1]
    assert losses["loss_right"].item() == pytest.approx(F.softplus(-parts[0]).mean().item(), rel=1e-4)
    assert losses["loss_fake"].item() == pytest.approx(F.softplus(fakes[:4]).mean().item(), rel=1e-4)
    assert losses["loss_G"].item() == pytest.approx(F.softplus(-fakes).mean().item(), rel=1e-4)
    wrong_is = F.softplus(parts[1]).mean() if cls else F.softplus(fakes[:4]).mean()
    assert losses["loss_wrong"].item() == pytest.approx(wrong_is.item(), rel=1e-4)
    assert len(fakes) == (6 if between else 4)


@pytest.mark.parametrize("flags", ["", "--no-cls --no-int"])
def test_gradients_of_an_update(flags):
    """D follows log s_r + (log(1 - s_w) + log(1 - s_f)) / 2, G log s_f, both from where they were, and nothing else."""
    args, before, state, (x, t, wrong), losses = updated(flags)
    other = text2img.build(args)
    for name in "GD":
        other[name].load_state_dict(before[name])
    G, D = other["G"], other["D"]
    torch.manual_seed(0)
    asked = torch.cat([t, (t[:2] + t[2:]) / 2]) if not args.no_int else t
    fake = G(torch.randn(len(asked), args.nz), asked)
    on_x = D.of_x(x)
    images, codes = [on_x, D.of_x(fake)], [t, asked]
    if not args.no_cls:
        images, codes = [on_x, *images], [t, wrong, asked]
    logits = D.match(torch.cat(images), torch.cat(codes))
    right, fakes = logits[:4], logits[len(logits) - len(asked) :]
    loss_D = F.softplus(-right).mean() + F.softplus(fakes[:4]).mean() * (0.5 if not args.no_cls else 1)
    loss_D = loss_D + (F.softplus(logits[4:8]).mean() / 2 if not args.no_cls else 0)
    for name, loss in (("D", loss_D), ("G", F.softplus(-fakes).mean())):
        weights = list(other[name].parameters())
        ours = [weight.grad for weight in state[name].parameters()]
        for grad, own in zip(torch.autograd.grad(loss, weights, retain_graph=True), ours, strict=True):
            torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-6)
    for name in "EVS":
        assert all(torch.equal(part, before[name][key]) for key, part in state[name].state_dict().items())


def test_phases_touch_their_own_networks():
    """The text step moves E and V, the style step S and nothing of G but nothing else."""
    args = ROW.args()
    state = text2img.build(args)
    before = {name: deepcopy(state[name].state_dict()) for name in "EVGDS"}

    def moved():
        return {n for n in "EVGDS" if any(not torch.equal(w, before[n][k]) for k, w in state[n].named_parameters())}

    chars = text2img.spelled(["a red bird", "a blue bird", "two birds", "none"]).long()
    text2img.make_text_step(args, state)(ROW.batch(args)[0], chars, torch.arange(4))
    assert moved() == {"E", "V"}
    text2img.make_style_step(args, state)(ROW.batch(args)[1])
    assert moved() == {"E", "V", "S"}


def test_schedules(tmp_path):
    """The rate of G and D halves, that of the encoder falls by 2 percent a pass, each from the start of its phase."""
    folder_of(tmp_path / "set", ["a", "b", "c", "d"], lambda i: [f"number {i}"])
    flags = ["--data", tmp_path / "set", "--style-epochs", 0, "--halve-every", 2, "--lr", 0.001, "--text-lr", 0.001]
    for text, gan, expected in ((3, 0, (0.001, 0.001 * 0.98**2)), (1, 5, (0.001 / 4, None))):  # a pass is an update
        run, passes = (
            tmp_path / f"run{text}",
            ["--text-epochs", text, "--epochs", max(gan, 1), "--max-steps", text + gan],
        )
        assert run_main(ROW, *ROW.tiny.split(), *flags, *passes, "--run", run) == 0
        rates = [float(read_checkpoint(run)[name]["param_groups"][0]["lr"]) for name in ("opt_G", "opt_D", "opt_E")]
        assert rates[0] == rates[1] == pytest.approx(expected[0])
        assert expected[1] is None or rates[2] == pytest.approx(expected[1])


def test_style_loss_by_hand():
    """|z - S(G(z, t))|^2, the mean over its numbers."""
    args = ROW.args()
    state, t = text2img.build(args), ROW.batch(args)[1]
    G, S = deepcopy(state["G"]), deepcopy(state["S"])
    torch.manual_seed(5)
    loss = text2img.make_style_step(args, state)(t)["loss_S"]
    torch.manual_seed(5)
    z = torch.randn(4, args.nz)
    assert loss.item() == pytest.approx((S(G(z, t)) - z).square().mean().item(), rel=1e-4)


# -- data ------------------------------------------------------------------------------------------------------------


def test_held_out_combinations():
    """No combination is in both parts, none has ink on its own colour, and a seed draws the same again."""
    seen, held = (text2img.shapes(3000, 0, held_out=part, size=8) for part in (False, True))
    kinds = [{tuple(label) for label in labels.tolist()} for _, _, labels in (seen, held)]
    assert kinds[0] and kinds[1] and not kinds[0] & kinds[1]
    assert all(ink != ground for _, ink, _, ground in kinds[0] | kinds[1])
    values = [len(part) for part in text2img.VALUES]
    assert len(kinds[0] | kinds[1]) == values[0] * values[1] * (values[1] - 1) * values[2]
    for ours, again in zip(held, text2img.shapes(3000, 0, held_out=True, size=8)):
        assert torch.equal(ours, again) if isinstance(ours, torch.Tensor) else ours == again


def test_toy_captions_tell_the_truth():
    """Each of five captions names form and both colours, and a word for the size."""
    _, captions, labels = text2img.shapes(60, 3, size=8)
    forms, inks, _, grounds = text2img.VALUES
    sizes = ({"small", "little", "tiny"}, {"large", "big", "huge"})
    for said, (form, ink, large, ground) in zip(captions, labels.tolist()):
        assert len(set(said)) == 5
        for words in (line.replace(",", "").split() for line in said):
            assert {forms[form], inks[ink], grounds[ground]} <= {*words} and sizes[large] & {*words}
            assert not sizes[1 - large] & {*words}


def test_toy_images_show_what_is_said():
    """The middle has the ink or, far out, the ground; a large shape covers more."""
    images, _, labels = text2img.shapes(200, 1, size=64)
    inks = torch.tensor([*text2img.INKS.values()]).float()
    corner = images[:, :, 1:4, 1:4].float().mean((2, 3))
    assert torch.cdist(corner, inks).argmin(1).eq(labels[:, 3]).all()
    covered = (images.float() - corner[..., None, None]).abs().amax(1).gt(60).float().mean((1, 2))
    assert covered[labels[:, 2] == 1].min() > covered[labels[:, 2] == 0].max()


@pytest.mark.parametrize(("near", "farthest"), [(1, math.inf), (1000, 1)])
def test_wrong_sentences_are_of_other_classes(near, farthest):
    """A batch's own codes are of its images' captions, the wrong ones of another class, the nearest of --near."""
    data, args = data_of("--near", near, "--wrong", 3, "--average", 1)
    owner = np.repeat(data.kinds, data.many)  # the class of each caption
    codes = torch.from_numpy(owner).float()[:, None].repeat(1, args.text)
    for done in range(20):
        _, t, wrong = text2img.draw_batch(args, data, codes, 1, done)
        assert t.shape == (4, args.text) and wrong.shape == (12, args.text)
        assert (wrong.view(3, 4, -1) != t).all() and (wrong.view(3, 4, -1) - t).abs().max() <= farthest


def test_codes_of_all_captions():
    """Each caption has E's code, as often as it is said, less the mean of all, with a spread of 1."""
    data, args = data_of()
    state = text2img.build(args)
    codes = text2img.encode(args, state, data)
    some = torch.tensor([0, 1, 7, 4999, len(codes) - 1])
    with torch.no_grad():
        expected = (state["E"](data.chars[some].long()) - state["E"].mean) / state["E"].spread
    torch.testing.assert_close(codes[some], expected, rtol=1e-4, atol=1e-4)
    assert codes.mean(0).abs().max() < 1e-3 and codes.std(0).mean().item() == pytest.approx(1, abs=1e-4)


def test_codes_are_averaged():
    """With more captions an image than one, their codes are averaged."""
    data, args = data_of("--average", 50)
    codes = torch.randn(int(data.many.sum()), args.text)
    expected = torch.stack([codes[a : a + n].mean(0) for a, n in zip(data.first, data.many)])
    _, t, _ = text2img.draw_batch(args, data, codes, 1, 0)
    assert (torch.cdist(t, expected).amin(1) < torch.cdist(t, expected).median(1).values / 2).all()


def test_folder_with_captions(tmp_path):
    """NAME.txt beside NAME.png, one caption a line; folders are classes."""
    folder_of(tmp_path / "set", ["birds/a", "birds/b", "dogs/c"], lambda i: [f"number {i}", "", f"again {i}"])
    data, _ = data_of("--data", tmp_path / "set")
    assert data.kinds.tolist() == [0, 0, 1] and data.many.tolist() == [2, 2, 2] and data.first.tolist() == [0, 2, 4]
    assert torch.equal(data.chars.cpu()[2], text2img.spelled(["number 1"])[0])
    assert data.read(0).shape == (3, 19, 19)


def test_list_of_captions(tmp_path):
    """captions.jsonl, with one caption or several a line; without folders each image is a class of its own."""
    folder_of(tmp_path / "set", ["a", "b"])
    rows = [{"file": "a.png", "captions": ["one", "two"]}, {"file": "b.png", "caption": "three"}]
    (tmp_path / "set" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, _ = data_of("--data", tmp_path / "set")
    assert data.kinds.tolist() == [0, 1] and data.many.tolist() == [2, 1]
    assert torch.equal(data.chars.cpu(), text2img.spelled(["one", "two", "three"]))


def test_archives_of_captions(tmp_path):
    """text_c10/CLASS/NAME.txt for images of CUB-200-2011 or Oxford-102; trainvalclasses.txt leaves classes out."""
    folder_of(tmp_path / "set" / "images", ["1/a", "1/b", "2/c"])
    for kind, name in (("1", "a"), ("1", "b"), ("2", "c")):
        file = tmp_path / "set" / "text_c10" / kind / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"this is {name}\n")
    data, _ = data_of("--data", tmp_path / "set")
    assert data.kinds.tolist() == [0, 0, 1] and data.many.tolist() == [1, 1, 1]
    (tmp_path / "set" / "trainvalclasses.txt").write_text("1\n")
    assert len(data_of("--data", tmp_path / "set")[0].kinds) == 2


def test_captions_from_class_names(tmp_path):
    """A folder of folders without captions is captioned by their names."""
    folder_of(tmp_path / "set", ["colts-foot/a", "lily_valley/b"])
    data, _ = data_of("--data", tmp_path / "set")
    assert data.kinds.tolist() == [0, 1]
    wanted = text2img.spelled(text2img.named("colts-foot"))
    assert torch.equal(data.chars.cpu()[: len(wanted)], wanted)
    assert "a photo of a colts foot" in text2img.named("colts-foot")


@pytest.mark.parametrize(
    ("names", "texts", "says"),
    [
        (["a", "b"], {}, "a.png"),  # no captions at all
        (["a", "b"], {"a.txt": "one"}, "b.png"),
        (["a"], {"a.txt": "one"}, "one image"),
        (["a", "b"], {"captions.jsonl": "{broken"}, "captions.jsonl"),
        (["a", "b"], {"captions.jsonl": '{"image": "a.png"}'}, "captions.jsonl"),
        (["a", "b"], {"a.txt": b"\xff\xfe\x00bad", "b.txt": "two"}, "a.txt"),
        (["a", "b"], {"a.txt": "\n \n", "b.txt": "two"}, "a.png"),
    ],
)
def test_bad_captions(tmp_path, call, names, texts, says):
    """What cannot be used as captions is named in one sentence."""
    folder_of(tmp_path / "set", names)
    for name, text in texts.items():
        (tmp_path / "set" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(call(ROW, *ROW.tiny.split(), "--data", tmp_path / "set", "--run", tmp_path / "run"), says)


# -- codes from elsewhere --------------------------------------------------------------------------------------------


def coded(path, tmp_path):
    """Flags of a run on three images with two captions each and codes of 8 numbers."""
    folder_of(tmp_path / "set", ["a", "b", "c"], lambda i: [f"number {i}", f"again {i}"])
    flags = "--data", tmp_path / "set", "--run", tmp_path / "run", "--embeddings", path, "--max-steps", 2
    return [*ROW.tiny.split(), *flags]


@pytest.mark.parametrize("kind", ["npy", "images", "pickle"])
def test_codes_instead_of_an_encoder(tmp_path, call, kind):
    """A .npy of codes, one of images x captions x numbers, or a pickle of arrays; then --prompt takes codes too."""
    codes, path = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32), tmp_path / f"codes.{kind}"
    if kind == "pickle":
        path.write_bytes(pickle.dumps([codes[:2], codes[2:4], codes[4:]], protocol=2))
    else:
        path = path.with_suffix(".npy")
        np.save(path, codes if kind == "npy" else codes.reshape(3, 2, 8))
    assert call(ROW, *coded(path, tmp_path)).code == 0
    E = read_checkpoint(tmp_path / "run")["E"]
    torch.testing.assert_close(E["mean"], torch.from_numpy(codes.mean(0)))
    np.save(tmp_path / "asked.npy", codes[:2])
    flags = "--run", tmp_path / "run", "--sample", 3, "--to", tmp_path / "out", "--device", "cpu", "--prompt"
    assert call(ROW, *flags, tmp_path / "asked.npy").code == 0
    assert len([*(tmp_path / "out").glob("*.png")]) == 6
    assert_refused(call(ROW, *flags, "a red bird"), "--prompt")


class Harm:
    """Pickled, it makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["hostile", "cut", "shape", "nan", "few"])
def test_bad_codes(tmp_path, call, kind):
    """No code is run, and what does not fit is refused."""
    path, good = tmp_path / "codes.npy", np.ones((6, 8), np.float32)
    if kind == "hostile":
        path = tmp_path / "codes.pickle"
        path.write_bytes(pickle.dumps([Harm()]))
    elif kind == "cut":
        np.save(path, good)
        path.write_bytes(path.read_bytes()[:-9])
    else:
        np.save(path, {"shape": good[:, :7], "nan": good * np.nan, "few": good[:5]}[kind])
    assert_refused(call(ROW, *coded(path, tmp_path)), path.name)
    assert not (tmp_path / "harm").exists()


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_several_prompts(tmp_path, call):
    """A file of sentences: N images of each, numbered by sentence; the same seed draws the same, another not."""
    run = tmp_path / "run"
    assert run_main(ROW, *ROW.tiny.split(), "--run", run, "--max-steps", 2) == 0
    (tmp_path / "asked.txt").write_text("a red circle\n\na blue bar\n")
    flags = "--run", run, "--prompt", tmp_path / "asked.txt", "--sample", 2, "--device", "cpu", "--to"
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert call(ROW, *flags, tmp_path / name, "--seed", seed).code == 0
    names = [file.name for file in sorted((tmp_path / "one").glob("*.png"))]
    assert names == ["000-00000.png", "000-00001.png", "001-00000.png", "001-00001.png"]
    pictures = [(tmp_path / name / names[0]).read_bytes() for name in ("one", "two", "three")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert (tmp_path / "one-sheet.png").exists() and (tmp_path / "one-figures" / "between-sentences.png").exists()


def test_bad_prompts(tmp_path, call):
    """A --sample without a --prompt, and a file without a sentence."""
    (tmp_path / "empty.txt").write_text("\n\n")
    run = tmp_path / "run"
    assert run_main(ROW, *ROW.tiny.split(), "--run", run, "--max-steps", 1) == 0
    assert_refused(call(ROW, "--run", run, "--sample", 2), "--prompt")
    assert_refused(call(ROW, "--run", run, "--sample", 2, "--prompt", tmp_path / "empty.txt"), "empty.txt")


def test_figures_at_the_end(tmp_path):
    """All phases in a short run leave their pictures; styles has a row a style and a column a sentence."""
    folder_of(tmp_path / "set", ["x/a", "x/b", "y/c", "z/d"], lambda i: [f"number {i}"])
    flags = "--data", tmp_path / "set", "--text-epochs", 1, "--epochs", 1, "--style-epochs", 1
    assert run_main(ROW, *ROW.tiny.split(), *flags, "--run", tmp_path / "run") == 0
    names = {file.name for file in (tmp_path / "run").glob("*.png")}
    assert names == {"sentences.png", "between-sentences.png", "between-z.png", "styles.png"}
    assert Image.open(tmp_path / "run" / "styles.png").size == (2 + 4 * 18, 3 * 20)
