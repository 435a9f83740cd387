"""--skip-bad: a broken image is named and nothing is trained, or it is left out."""

import torch
from scripts import assert_refused, read_checkpoint


def test_skip_bad(row, call, tmp_path):
    """One broken image among the others: refused by name; with --skip-bad trained without, again without decoding."""
    row.data(tmp_path / "set")
    bad = sorted((tmp_path / "set").rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:60])
    flags = [*row.resume.split(), "--data", tmp_path / "set", "--run", tmp_path / "run", "--max-steps"]
    assert_refused(call(row, *flags, 1), bad.name)
    assert not (tmp_path / "run" / "last.pt").exists()
    result = call(row, *flags, 1, "--skip-bad")
    assert (result.code, result.err) == (0, "") and str(bad) in result.out and "left out" in result.out
    count = read_checkpoint(tmp_path / "run")["settings"]["count"]
    assert count == ([7, 8] if row.name == "cyclegan" else 7)
    result = call(row, *flags, 2, "--skip-bad")
    assert result.code == 0 and "decoding" not in result.out and read_checkpoint(tmp_path / "run")["step"] == 2
    assert_refused(call(row, *flags, 3), bad.name)


def test_all_bad(row, call, tmp_path):
    """A set of which nothing can be read is refused."""
    row.data(tmp_path / "set")
    for file in (tmp_path / "set").rglob("*.png"):
        file.write_bytes(b"no image")
    flags = [*row.resume.split(), "--data", tmp_path / "set", "--run", tmp_path / "run", "--skip-bad"]
    assert call(row, *flags, "--max-steps", 1).code == 2
    assert not (tmp_path / "run" / "last.pt").exists()


def test_labels_stay_with_their_images(tmp_path):
    """What is left out takes its label along."""
    from scripts import labelled_pictures

    import cgan

    labelled_pictures(tmp_path / "set")
    flags = ["--data", str(tmp_path / "set"), "--size", "8", "--device", "cpu", "--skip-bad"]
    images, labels, names = cgan.load_images(cgan.get_args(flags))
    (tmp_path / "set" / "cats" / "0.png").write_bytes(b"no image")
    fewer, kept, _ = cgan.load_images(cgan.get_args(flags))
    assert torch.equal(fewer, images[1:]) and torch.equal(kept, labels[1:]) and names == ["cats", "dogs"]
