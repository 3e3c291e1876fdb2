"""The example's parts that need no training."""

import gzip
import struct
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import loaded


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    return loaded("examples/digits.py")


def idx(array: torch.Tensor) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.to(torch.uint8).numpy().tobytes()


def write_fashion(folder: Path, *, packed: bool) -> dict[str, torch.Tensor]:
    arrays = {
        "train-images-idx3-ubyte": torch.arange(5 * 2 * 3).view(5, 2, 3),
        "train-labels-idx1-ubyte": torch.tensor([0, 1, 2, 1, 0]),
        "t10k-images-idx3-ubyte": 255 - torch.arange(2 * 2 * 3).view(2, 2, 3),
        "t10k-labels-idx1-ubyte": torch.tensor([2, 0]),
    }
    for name, array in arrays.items():
        content = idx(array)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read(digits, tmp_path: Path, packed: bool) -> None:
    arrays = write_fashion(tmp_path, packed=packed)
    data = digits.load_fashion_mnist(tmp_path)
    images = arrays["train-images-idx3-ubyte"]
    assert data.train_x.tolist() == images.flatten(1).tolist()
    assert data.valid_x[0, 0] == 255
    assert data.train_y.tolist() == [0, 1, 2, 1, 0]
    assert data.valid_y.dtype == torch.int64


def test_a_missing_folder_says_where_the_data_are(digits) -> None:
    with pytest.raises(digits.DataError, match="apt-get install dataset-fashion-mnist"):
        digits.load_fashion_mnist(None)


def test_a_missing_file_is_named(digits, tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(digits.DataError, match=r"t10k-labels.*apt-get install"):
        digits.load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", idx(torch.zeros(2, 3))[:-1]])
def test_a_damaged_file_is_refused(digits, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(digits.DataError, match="file"):
        digits.read_idx(tmp_path / "file")


def test_scaled_data_are_centred(digits) -> None:
    x = torch.randn(50, 4) * 3.0 + 7.0
    y = torch.zeros(50).long()
    data = digits.Data(x, y, x[:5], y[:5]).scaled(torch.float64)
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(4))
    torch.testing.assert_close(data.train_x.std(), torch.tensor(1.0))
    torch.testing.assert_close(data.valid_x, data.train_x[:5])


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],
        ["--batch-size", "-1"],
        ["--lr", "nan"],
        ["--mass", "0"],
        ["--data", "mnist"],
        ["--dtype", "float16"],
    ],
)
def test_bad_arguments_are_refused(digits, argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        digits.arguments(argv)
    assert argv[0] in capsys.readouterr().err


def test_the_data_have_their_own_defaults(digits) -> None:
    assert digits.arguments([]).mass == digits.TUNED["digits"]["mass"]
    given = digits.arguments(["--data", "fashion-mnist", "--lr", "0.25"])
    assert given.lr == 0.25
    assert given.epochs == digits.TUNED["fashion-mnist"]["epochs"]


def test_a_batch_larger_than_the_data_is_refused(digits, tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    argv = ["--data", "fashion-mnist", "--folder", str(tmp_path), "--batch-size", "6"]
    with pytest.raises(SystemExit, match="6 is more than the 5 training examples"):
        digits.main(argv)


def test_the_example_runs_on_other_data(digits, tmp_path: Path, capsys) -> None:
    write_fashion(tmp_path, packed=True)
    argv = ["--data", "fashion-mnist", "--folder", str(tmp_path), "--batch-size", "5"]
    assert digits.main([*argv, "--width", "3", "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    for word in ("layer metric", "Adam", "geoopt", "validation", "|step|"):
        assert word in printed
