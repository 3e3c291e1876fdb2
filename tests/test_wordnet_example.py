"""The example on WordNet: its reader, its scores, and a short race on a small tree."""

import importlib
import itertools
import math
from pathlib import Path
from types import ModuleType

import geoopt
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

# A diamond (cat is a pet and a carnivore), an instance (Felix), a hypernym outside
# (pet), counts in hexadecimal (12 words), pointers that are not hypernyms, and a
# synset before its hypernym.
NOUNS = {
    "00000010": (["animal"], [("~", "00000030")]),
    "00000020": (["cat", "true_cat"], [("@", "00000040"), ("@", "00000060")]),
    "00000030": (["mammal", "mammalian"], [("@", "00000010"), ("~", "00000040")]),
    "00000040": (["wild_carnivore"], [("@", "00000030"), ("!", "00000070")]),
    "00000050": (["Felix"], [("#m", "00000030"), ("@i", "00000020")]),
    "00000060": (["pet"], [("@", "00000010")]),
    "00000070": (list("abcdefghijkl"), [("@", "00000030")]),
    "00000080": (["cat"], []),
}


def line(offset: str, words: list[str], pointers: list[tuple[str, str]]) -> str:
    said = "".join(f"{word} 0 " for word in words)
    linked = "".join(f"{symbol} {target} n 0000 " for symbol, target in pointers)
    return f"{offset} 05 n {len(words):02x} {said}{len(pointers):03} {linked}| a gloss"


def write(folder: Path, extra: str = "") -> Path:
    licence = "  1 This software and database is provided | by @ 00000010 n  \n"
    lines = [line(offset, *noun) for offset, noun in NOUNS.items()]
    path = folder / "data.noun"
    path.write_text(licence + "\n".join(lines) + "  \n" + extra, encoding="utf-8")
    return path


@pytest.fixture
def wordnet(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("wordnet")


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("wordnet_poincare")


@pytest.fixture
def tree(wordnet, tmp_path: Path):
    write(tmp_path)
    return wordnet.load(tmp_path, "mammal")


# --- reading


def test_synsets_are_read(wordnet, tmp_path: Path) -> None:
    nouns = wordnet.read_nouns(write(tmp_path))
    assert list(nouns) == list(NOUNS)
    assert nouns["00000020"].words == ["cat", "true_cat"]
    assert nouns["00000020"].hypernyms == ["00000040", "00000060"]
    assert nouns["00000040"].hypernyms == ["00000030"]
    assert nouns["00000050"].hypernyms == ["00000020"]
    assert nouns["00000070"].words == list("abcdefghijkl")
    assert nouns["00000010"].hypernyms == []


@pytest.mark.parametrize(
    "damaged",
    [
        "00000090 05 n 01 dog 0 002 @ 00000030 n 0000 | a pointer less",
        "00000090 05 n 02 dog 0 001 @ 00000030 n 0000 | a word less",
        "00000090 05 n 0x dog 0 000 | no number",
        "00000090 05",
        "some text",
    ],
)
def test_a_damaged_line_is_named(wordnet, tmp_path: Path, damaged: str) -> None:
    with pytest.raises(wordnet.DataError, match=r"line 10 of .*data\.noun"):
        wordnet.read_nouns(write(tmp_path, extra=damaged))


def test_the_tree_and_its_closure(tree) -> None:
    names = ["mammal", "cat", "wild carnivore", "Felix", "a"]
    assert tree.names == names
    edges = {(names[i], names[j]) for i, j in tree.edges.tolist()}
    assert len(tree.edges) == len(edges)
    assert edges == {
        ("cat", "wild carnivore"),
        ("wild carnivore", "mammal"),
        ("Felix", "cat"),
        ("a", "mammal"),
    }
    pairs = {(names[i], names[j]) for i, j in tree.related.nonzero().tolist()}
    assert pairs == edges | {
        ("cat", "mammal"),
        ("Felix", "wild carnivore"),
        ("Felix", "mammal"),
    }


def test_both_ways_up_are_followed(wordnet, tmp_path: Path) -> None:
    tree = wordnet.subtree(wordnet.read_nouns(write(tmp_path)), "00000010")
    assert tree.names[0] == "animal"
    cat = tree.names.index("cat")
    above = {tree.names[i] for i in tree.related[cat].nonzero().flatten().tolist()}
    assert above == {"animal", "mammal", "wild carnivore", "pet"}


def test_the_root_belongs_to_one_synset(wordnet, tmp_path: Path) -> None:
    nouns = wordnet.read_nouns(write(tmp_path))
    with pytest.raises(wordnet.DataError, match=r"2 synsets.*00000020.*00000080"):
        wordnet.subtree(nouns, "cat")
    with pytest.raises(wordnet.DataError, match="0 synsets"):
        wordnet.subtree(nouns, "dog")
    with pytest.raises(wordnet.DataError, match="no synset is below"):
        wordnet.subtree(nouns, "Felix")
    assert wordnet.subtree(nouns, "00000020").names == ["cat", "Felix"]


def test_missing_data_say_where_to_get_them(example, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install wordnet-base") as caught:
        example.main(["--folder", str(tmp_path)])
    assert str(tmp_path) in str(caught.value)
    assert "--folder" in str(caught.value)


def test_missing_data_in_all_usual_places(example, wordnet, monkeypatch, tmp_path):
    monkeypatch.setattr(wordnet, "PLACES", (str(tmp_path / "no"), str(tmp_path)))
    with pytest.raises(SystemExit, match="apt-get install wordnet-base"):
        example.main([])
    write(tmp_path)
    assert wordnet.load(None, "mammal").names[0] == "mammal"


# --- batches


def test_batches_hold_true_pairs_and_negatives(wordnet, tree) -> None:
    sampler = wordnet.Sampler(tree, negatives=40, seed=0)
    batch = sampler.draw(7)
    assert batch.shape == (7, 42)
    assert sorted(batch[:, :2].tolist()) == tree.related.nonzero().tolist()
    for below, _, *others in batch.tolist():
        related = set(tree.related[below].nonzero().flatten().tolist())
        assert set(others) == set(range(5)) - related - {below}


def test_batches_go_on_after_an_epoch(wordnet, tree) -> None:
    first, second = (wordnet.Sampler(tree, negatives=1, seed=3) for _ in range(2))
    batches = torch.cat([first.draw(4) for _ in range(7)])
    assert batches.tolist() == torch.cat([second.draw(4) for _ in range(7)]).tolist()
    for epoch in batches[:, :2].split(7):
        assert sorted(epoch.tolist()) == tree.related.nonzero().tolist()


def test_a_synset_below_all_others_is_refused(wordnet) -> None:
    nouns = {"1": wordnet.Synset(["top"], []), "2": wordnet.Synset(["low"], ["1"])}
    with pytest.raises(wordnet.DataError, match="no negatives"):
        wordnet.Sampler(wordnet.subtree(nouns, "top"), negatives=1, seed=0)


# --- scores


def test_scores_by_hand(wordnet) -> None:
    # On a line: r at 0, a at 1, b at 3, c at -4; a, b, c are below r, and b below a.
    place = torch.tensor([0.0, 1.0, 3.0, -4.0])
    distances = (place[:, None] - place).abs()
    related = torch.zeros(4, 4, dtype=torch.bool)
    related[[1, 2, 3, 2], [0, 0, 0, 1]] = True
    # a: r first (1), so 1.          b: a (2) and r (3) before c (7), so 1 and 1.
    # c: r first (4), so 1.
    assert wordnet.reconstruction(distances, related) == (1.0, 1.0)
    # Now b at 0.9: it is nearer to a (0.1) than r (1), and c is still far from it.
    # a: b before r: rank 2, precision 1/2. b: a, r, c: ranks 1, 1. c: r (4): rank 1.
    place[2] = 0.9
    distances = (place[:, None] - place).abs()
    rank, average = wordnet.reconstruction(distances, related)
    assert rank == pytest.approx((2 + 1 + 1 + 1) / 4)
    assert average == pytest.approx((1 / 2 + 1 + 1) / 3)
    # And c at 0.5: r and c and b and a from b: c (0.4) lies between a and r.
    place[3] = 0.5
    distances = (place[:, None] - place).abs()
    rank, average = wordnet.reconstruction(distances, related)
    # a: b (0.1), c (0.5), r (1): rank 3, precision 1/3.
    # b: a (0.1), c (0.4), r (0.9): ranks 1 and 2, precisions 1 and 2/3.
    # c: b (0.4), r and a (0.5): rank 3, precision 1/3, for a tie counts against it.
    assert rank == pytest.approx((3 + 1 + 2 + 3) / 4)
    assert average == pytest.approx((1 / 3 + (1 + 2 / 3) / 2 + 1 / 3) / 3)


def test_scores_against_their_definition(wordnet) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (12, 2), generator=generator).double()
    distances = (x[:, None] - x).abs().sum(-1)  # with ties
    related = torch.rand(12, 12, generator=generator) < 0.3
    related.fill_diagonal_(False)
    related[4] = False
    ranks, averages = [], []
    for u in range(12):
        precisions = []
        for v in related[u].nonzero().flatten().tolist():
            nearer = [
                w for w in range(12) if w != u and distances[u, w] <= distances[u, v]
            ]
            true = [w for w in nearer if related[u, w]]
            ranks.append(1 + len(nearer) - len(true))
            precisions.append(len(true) / len(nearer))
        if precisions:
            averages.append(math.fsum(precisions) / len(precisions))
    assert len(averages) == 11
    rank, average = wordnet.reconstruction(distances, related)
    assert rank == pytest.approx(sum(ranks) / len(ranks))
    assert average == pytest.approx(sum(averages) / len(averages))


def test_scores_of_a_diverged_table_are_no_numbers(wordnet) -> None:
    related = torch.tensor([[False, True], [False, False]])
    scores = wordnet.reconstruction(torch.full((2, 2), torch.nan), related)
    assert all(math.isnan(score) for score in scores)


# --- the model


def test_distance_is_that_of_the_ball(example) -> None:
    ball = geoopt.PoincareBall()
    x = torch.tensor([[0.1, 0.2], [0.9, 0.3], [-0.6, 0.7]], dtype=torch.float64)
    for u, v in itertools.combinations(x, 2):
        torch.testing.assert_close(example.distance(u, v), ball.dist(u, v))
    near = x[1] + torch.tensor([1e-12, 0.0], dtype=torch.float64)
    scale = 2.0 / (1.0 - x[1].square().sum())
    ratio = example.distance(x[1], near) / (scale * (near - x[1]).norm())
    torch.testing.assert_close(ratio, torch.tensor(1.0, dtype=torch.float64))


def test_gradients_are_finite_at_equal_points_and_at_the_rim(example) -> None:
    x = torch.tensor([[0.3, 0.4], [0.0, 0.0], [1 - 1e-5, 0.0]], dtype=torch.float64)
    x.requires_grad_()
    table = example.distance(x[:, None], x)
    assert table.diagonal().tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(table.sum(), x)
    assert gradient.isfinite().all()


def test_logits_are_distances_to_the_first(example) -> None:
    model = example.Embedding(5, 3, seed=0)
    points = model.points.weight
    indices = torch.tensor([[0, 1, 4], [3, 3, 2]])
    logits = model(indices)
    assert logits.shape == (2, 2)
    torch.testing.assert_close(
        logits[0, 1], -points.manifold.dist(points[0], points[4])
    )
    assert logits[1, 0] == 0.0


# --- the race


def clock(monkeypatch, example, tick: float = 0.01) -> None:
    """Let every look at the clock take as long, so that a race has no chance in it."""
    ticks = itertools.count()
    monkeypatch.setattr(example.time, "perf_counter", lambda: tick * next(ticks))


@pytest.mark.parametrize("name", ["geoopt RiemannianSGD", "geoopt RiemannianAdam"])
def test_training_improves_the_scores(example, tree, name: str, monkeypatch) -> None:
    clock(monkeypatch, example)
    options = example.arguments(
        ["--seconds", "3", "--batch-size", "7", "--negatives", "4"]
    )
    settings = {"lr": 0.3 if name.endswith("SGD") else 0.03}
    run = example.Run(name, settings, tree, 0, options)
    before = run.scores(tree)
    example.race([run], "test")
    rank, average, loss, steps, seconds = run.scores(tree)
    assert average > before[1] + 0.1
    assert rank < before[0]
    assert loss < before[2] - 0.5
    assert steps == pytest.approx(300, abs=1)
    assert seconds == pytest.approx(3.0, abs=0.02)


def test_the_burn_in_takes_short_steps(example, tree, monkeypatch) -> None:
    clock(monkeypatch, example)
    options = example.arguments(["--seconds", "1"])
    run = example.Run("geoopt RiemannianSGD", {"lr": 2.0}, tree, 0, options)
    rates = []
    for _ in range(12):
        run.advance()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([0.2] * 10)
    assert rates[11] == 2.0


def test_runs_share_start_and_batches(example, tree) -> None:
    options = example.arguments([])
    names = ["geoopt RiemannianSGD", "geoopt RiemannianAdam"]
    one, two = (example.Run(n, {"lr": 1.0}, tree, 5, options) for n in names)
    assert torch.equal(one.model.points.weight, two.model.points.weight)
    one.advance()
    assert not torch.equal(one.model.points.weight, two.model.points.weight)
    two.advance()
    assert torch.equal(one.sampler.draw(9), two.sampler.draw(9))


@pytest.mark.parametrize("tune", [False, True])
def test_the_example_prints_and_draws(
    example, tmp_path: Path, capsys, monkeypatch, tune: bool
) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the extra 'examples'")
    write(tmp_path)
    clock(monkeypatch, example)
    picture = tmp_path / "disk.png"
    names = ["layer metric", "geoopt RiemannianSGD", "geoopt RiemannianAdam"]
    argv = ["--folder", str(tmp_path), "--methods", *names, "--seconds", "0.2"]
    argv += ["--seeds", "2", "--plot", str(picture), *(["--tune"] if tune else [])]
    assert example.main(argv) == 0
    printed = capsys.readouterr().out
    assert "5 synsets below 'mammal', 4 edges, 7 pairs" in printed
    for word in ("mean rank", "MAP", "loss", "steps", "seconds", *names):
        assert word in printed
    tried = printed.count("  lr ")
    assert tried == (sum(len(example.SETTINGS[n]) for n in names) if tune else 0)
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "argv",
    [
        ["--seconds", "0"],
        ["--seeds", "-1"],
        ["--dim", "x"],
        ["--methods", "SGD"],
        ["--plot", "disk.png", "--dim", "3"],
    ],
)
def test_bad_arguments_are_refused(example, argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        example.arguments(argv)
    assert argv[0] in capsys.readouterr().err
