"""The examples on images and on characters, in the smallest settings."""

import importlib
import math
import struct
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, monkeypatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture
def cnn(monkeypatch) -> ModuleType:
    torch.set_default_dtype(torch.float32)  # what a reader has
    return load("fashion_mnist_cnn", monkeypatch)


@pytest.fixture
def chars(monkeypatch) -> ModuleType:
    torch.set_default_dtype(torch.float32)
    return load("char_transformer", monkeypatch)


# --- images


def write_images(folder: Path, train: int, valid: int, side: int = 28) -> None:
    """Write images whose class is the row that is bright."""
    for part, count in (("train", train), ("t10k", valid)):
        labels = torch.arange(count) % 10
        images = torch.zeros(count, side, side, dtype=torch.uint8)
        images[torch.arange(count), labels % side] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim])
            head += struct.pack(f">{array.ndim}I", *array.shape)
            body = array.to(torch.uint8).numpy().tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + body)


def test_the_filters_are_orthonormal(cnn) -> None:
    model = cnn.make_model(0)
    layers = [model.get_submodule(name) for name in cnn.CONVOLUTIONS]
    assert all(cnn.defect(layer) < 1e-5 for layer in layers)
    layers[0].weight.data.mul_(2.0)
    assert cnn.defect(layers[0]) == pytest.approx(3.0 * math.sqrt(16), rel=1e-4)


@pytest.mark.parametrize("methods", [["adam"], ["geoopt"], ["layer"], ["kfac"]])
def test_images_are_learned(cnn, tmp_path: Path, capsys, methods: list[str]) -> None:
    write_images(tmp_path, train=200, valid=50)
    argv = ["--folder", str(tmp_path), "--batch-size", "20", "--epochs", "6"]
    argv += ["--geoopt-lr", "0.01", "--methods", *methods]
    assert cnn.main(argv) == 0
    printed = capsys.readouterr().out
    (row,) = (
        line
        for line in printed.splitlines()
        if line.startswith(cnn.METHODS[methods[0]])
    )
    assert "100.0 %" in row
    left = float(row.split()[-1])
    assert left > 1e-2 if methods == ["adam"] else left < 1e-4


def test_images_and_curves_are_plotted(cnn, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the extra 'examples'")
    write_images(tmp_path, train=40, valid=10)
    picture = tmp_path / "cnn.png"
    argv = ["--folder", str(tmp_path), "--images", "30", "--batch-size", "10"]
    argv += ["--plot", str(picture), "--methods", "adam", "geoopt", "kfac"]
    with pytest.raises(SystemExit):
        cnn.main(argv)
    assert "--plot compares all methods" in capsys.readouterr().err
    assert cnn.main([*argv, "adam"]) == 0
    assert "30 images to train on, 10 for validation" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_images_say_where_to_get_them(cnn, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        cnn.main(["--folder", str(tmp_path)])


def test_unfitting_images_are_refused(cnn, tmp_path: Path) -> None:
    write_images(tmp_path, train=30, valid=10)
    with pytest.raises(SystemExit, match="50 is more than the 30 images"):
        cnn.main(["--folder", str(tmp_path), "--batch-size", "50"])
    write_images(tmp_path, train=30, valid=10, side=8)
    with pytest.raises(SystemExit, match="64 pixels"):
        cnn.main(["--folder", str(tmp_path), "--batch-size", "10"])


# --- characters


def test_docstrings_are_read_without_importing(chars, tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text('"""Module b."""\nraise SystemExit\n')
    (tmp_path / "a.py").write_text(
        'class A:\n    """Class A."""\n\n    def f(self):\n        "Method f."\n\n'
        "    def g(self):\n        return 'no docstring'\n"
    )
    assert chars.docstrings(tmp_path) == "Class A.\n\nMethod f.\n\nModule b."


def test_the_standard_library_is_the_default(chars) -> None:
    text = chars.load(None, 32)
    assert len(text.train) > 100_000
    everything = torch.cat([text.train, text.valid])
    assert len(text.valid) == pytest.approx(len(everything) / 10, abs=1)
    assert int(everything.max()) < len(text.alphabet)


def test_rare_characters_share_a_number(chars, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chars, "ALPHABET", 2)
    path = tmp_path / "text.txt"
    path.write_text("ab" * 30 + "xyz", encoding="utf-8")
    text = chars.load(path, 2)
    assert text.alphabet == "ab" + chars.OTHER
    assert torch.cat([text.train, text.valid]).tolist() == [0, 1] * 30 + [2] * 3


@pytest.mark.parametrize("content", [None, b"short", b"\xff" * 5000])
def test_bad_texts_are_refused(chars, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"text\.txt.*--text"):
        chars.main(["--text", str(path)])


def test_windows(chars) -> None:
    found = chars.windows(torch.arange(10) * 10, torch.tensor([0, 7]), 3)
    assert found.tolist() == [[0, 10, 20], [70, 80, 90]]


def test_the_transformer_looks_back_only(chars) -> None:
    torch.manual_seed(0)
    model = chars.Transformer(characters=7, context=6, width=8, layers=2)
    x = torch.randint(7, (3, 6))
    other = x.clone()
    other[:, 4] = (other[:, 4] + 1) % 7
    before, after = model(x), model(other)
    assert before.shape == (3, 6, 7)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])
    assert not torch.allclose(before[:, 5], after[:, 5])
    torch.testing.assert_close(model(x[:, :3]), before[:, :3])


def test_a_text_is_learned(chars, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the extra 'examples'")
    path, picture = tmp_path / "text.txt", tmp_path / "curves.png"
    path.write_text("abcde\n" * 200, encoding="utf-8")
    argv = ["--text", str(path), "--steps", "60"]
    argv += ["--layers", "1", "--width", "16", "--adam-lr", "0.02", "--context", "8"]
    assert chars.main([*argv, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for name in ("Adam  ", "KFAC  "):
        (row,) = (line for line in printed.splitlines() if line.startswith(name))
        assert float(row.split()[1]) < 0.5  # at first log2(7) bits
        assert float(row.split()[2]) < 0.5
    assert "abcde\\nabcde\\n" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "argv", [["--steps", "0"], ["--width", "6"], ["--methods", "sgd"]]
)
def test_bad_arguments_are_refused(chars, argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        chars.arguments(argv)
    assert argv[0] in capsys.readouterr().err
