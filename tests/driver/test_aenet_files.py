"""Files of ænet: networks as text and structures, against files written out by hand, and round trips to the last bit."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.backends import aenet_names, registry
from tumbaga.driver.backends.aenet_files import Basis, ElementNetwork, Window, read_network, spins, write_network
from tumbaga.driver.backends.aenet_xsf import Structure, read_xsf, write_xsf
from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.online.records import Frame

# one hidden layer of two nodes on six descriptors (radial 0 1, angular 0, the same weighted); lists broken over lines as ænet-python does
COPPER = """\
                3
                6
               17
               11
                6                 2                 1
                1                 0
                0                14                17
                0                 7                11
 0.1  -0.1  0.2  -0.2  0.3  -0.3
 0.4  -0.4  0.5  -0.5  0.6D0 -0.6D0  0.7  -0.7
 1.5  -2.5  0.25
 Descriptor for Cu$$ by hand
Cu
                2
Au Cu
     0.50000000000000000
     4.00000000000000000
Chebyshev
                6
                4
                0    0    0    0    0    0
 4.0 1.0 3.0 0.0
 0.0 0.0 0.0 0.0  0.0 0.0 0.0 0.0  0.0 0.0 0.0 0.0  0.0 0.0 0.0 0.0
 0.0 0.0 0.0 0.0
 0 0 0 0 0 0 0 0 0 0 0 0
          7308000
 0.0 -1.0 0.0 -1.0 -1.0 -1.0
 9.0  1.0 9.0  1.0  1.0  1.0
 2.0  0.5 1.0  0.0  0.0  3.0
 5.0  4.25 1.0 1.0  4.0  8.0
CuAu.train.ascii
True
 2.0
-3.5
2
Cu Au
-100.25 -200.5
 12
 3
-4.0 -3.0 -3.5
"""
CLUSTER = """\
# total energy = -19543.67017695 eV

ATOMS
O   5.900  3.922  0.851 -0.001  0.001 -0.001
C   5.133  4.445  0.095  0.082  0.104  0.206
8   4.104  5.151  0.087  0.003 -0.001  0.000
"""
CRYSTAL = """\
# total energy = -4990.44928342 eV

CRYSTAL
PRIMVEC
   2.967  0.000  0.000
   0.000  4.648  0.000
   0.100 -0.000  4.648
PRIMCOORD
3 1
Ti 1.483  2.324  2.324  0.000  0.000  0.000
O  1.483  0.905  0.905  0.000 -0.004 -0.004
O  1.483  3.742  3.742  0.000  0.004  0.004
"""


def written(folder: Path, text: str, name: str = "Cu.nn.ascii") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def network(
    symbol: str = "Cu", environment: tuple[str, ...] = ("Cu", "Au"), hidden: tuple[int, ...] = (4, 3), seed: int = 0
) -> ElementNetwork:
    rng = np.random.default_rng(seed)
    basis = Basis(5.0, 3, 4.0, 2)
    width = basis.width * min(len(environment), 2)
    sizes = (width, *hidden, 1)
    average = rng.normal(size=width)
    return ElementNetwork(
        element=symbol,
        environment=environment,
        basis=basis,
        weights=tuple(rng.normal(size=(n, m)) for m, n in pairwise(sizes)),
        biases=tuple(rng.normal(size=n) for n in sizes[1:]),
        activations=(*([1] * len(hidden)), 0),
        lowest=average - 1e-17,
        highest=average + 1e5,
        average=average,
        squares=average**2 + rng.uniform(0.5, 2.0, width),
        window=Window(1.27384834786371, -7.786247938833317, -8.5, -7.0, -8.2),
        species=("Au", "Cu"),
        atomic=(-200.5, -1604.604515075),
        description="by a test",
        r_min=0.35,
        source="some.train",
        n_atoms=21285,
        n_structures=1000,
        n_evaluations=7308,
    )


# -- networks --------------------------------------------------------------------------------------------------------------------------


def test_a_file_written_by_hand_is_read_as_it_is_meant(tmp_path: Path) -> None:
    """Weights are columns one after the other with the bias last, lists take as many lines as they need, D is an exponent."""
    found = read_network(written(tmp_path, COPPER))

    np.testing.assert_array_equal(found.weights[0], [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]])
    np.testing.assert_array_equal(found.biases[0], [0.7, -0.7])
    np.testing.assert_array_equal(found.weights[1], [[1.5, -2.5]])
    np.testing.assert_array_equal(found.biases[1], [0.25])
    assert (found.element, found.environment, found.activations) == ("Cu", ("Au", "Cu"), (1, 0))
    assert (found.basis, found.r_min, found.description) == (Basis(4.0, 1, 3.0, 0), 0.5, "Descriptor for Cu$$ by hand")
    assert (found.window, found.atomic_energy) == (Window(2.0, -3.5, -4.0, -3.0, -3.5), -100.25)
    assert (found.source, found.n_atoms, found.n_structures, found.n_evaluations) == ("CuAu.train.ascii", 12, 3, 7308000)
    np.testing.assert_array_equal(found.lowest, [0.0, -1.0, 0.0, -1.0, -1.0, -1.0])
    np.testing.assert_array_equal(found.highest, [9.0, 1.0, 9.0, 1.0, 1.0, 1.0])


def test_a_descriptor_that_never_varies_is_left_out(tmp_path: Path) -> None:
    """Scales are one over the standard deviation; 0 where it is 0, or where rounding made the variance negative."""
    found = read_network(written(tmp_path, COPPER))

    np.testing.assert_allclose(found.scales, [1.0, 0.5, 0.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("count", "ladder"),
    [(1, [0.0]), (2, [-1.0, 1.0]), (3, [-1.0, 0.0, 1.0]), (4, [-2.0, -1.0, 1.0, 2.0]), (5, [-2.0, -1.0, 0.0, 1.0, 2.0])],
)
def test_species_have_weights_by_their_order(count: int, ladder: list[float]) -> None:
    """From -(n // 2) upwards; 0 is left out where n is even."""
    assert list(spins([str(k) for k in range(count)]).values()) == ladder


@pytest.mark.parametrize(
    "one", [network(), network("Au", ("Cu", "Au", "H"), (2,)), network("Cu", ("Cu",), ())], ids=["two", "one", "linear"]
)
def test_a_network_survives_its_file(one: ElementNetwork, tmp_path: Path) -> None:
    """All numbers to the last bit, all words."""
    write_network(tmp_path / "x.nn.ascii", one)
    found = read_network(tmp_path / "x.nn.ascii")

    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(found, field.name)
        if isinstance(mine, np.ndarray) or field.name in ("weights", "biases"):
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            assert mine == theirs, field.name


def test_the_places_of_layers_are_those_of_the_shipped_example(tmp_path: Path) -> None:
    """56-5-5-1: 321 weights at 0 285 315 321, 70 values at 0 57 63 69, as in the TiO2 example of ænet-PyTorch."""
    none = np.zeros(56)
    wide = replace(network(), basis=Basis(), lowest=none, highest=none, average=none, squares=none)
    wide = replace(wide, weights=(np.zeros((5, 56)), np.zeros((5, 5)), np.zeros((1, 5))), biases=(np.zeros(5), np.zeros(5), np.zeros(1)))
    write_network(tmp_path / "x.nn.ascii", replace(wide, activations=(1, 1, 0)))
    lines = (tmp_path / "x.nn.ascii").read_text().splitlines()

    assert [line.split() for line in lines[:8]] == [
        ["4"], ["56"], ["321"], ["70"], ["56", "5", "5", "1"], ["1", "1", "0"], ["0", "285", "315", "321"], ["0", "57", "63", "69"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Chebyshev", "Behler2011", "its descriptors are of type 'Behler2011'; only Chebyshev is supported"),
        (" 0.1  -0.1", " 0.1", "words where|something else where"),
        ("   17\n", "   18\n", "announces 18 weights for layers of"),
        ("     1                 0\n", "     7                 0\n", r"has activation functions \[7, 0\]"),
        ("     1                 0\n", "     1                 1\n", r"has activation functions \[1, 1\]"),
        ("0.2  -0.2", "0.2  x", "something else where the weights belongs"),
        ("0.2  -0.2", "0.2  nan", "not finite"),
        ("\nCu\n", "\nXx\n", "names 'Xx', which is no element"),
        ("Au Cu\n", "Cu Cu\n", "names a species of the environment twice"),
        ("Au Cu\n", "Au\n", "words where|something else where|no element"),
        (" 4.0 1.0 3.0 0.0\n", " 3.0 1.0 4.0 0.0\n", "with cutoffs 3 and 4 Å"),
        (" 4.0 1.0 3.0 0.0\n", " 4.0 2.0 3.0 0.0\n", "a network of 6 inputs and 6 descriptors, which do not belong to its set-up"),
        ("Cu Au\n-100", "Pt Au\n-100", "has no atomic energy of Cu"),
        (" 2.0\n-3.5", " -2.0\n-3.5", "has the energy scale -2"),
        ("-4.0 -3.0 -3.5\n", "", "ends before the range of the energies"),
        ("                3\n", "        3000000000\n", "out of range in the number of layers"),
        ("                3\n", "                1\n", "announces 1 layers"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_a_sentence(old: str, new: str, told: str, tmp_path: Path) -> None:
    """The sentence names the file and what is wrong with it."""
    assert old in COPPER
    path = written(tmp_path, COPPER.replace(old, new, 1))
    with pytest.raises(PotentialError, match=told) as caught:
        read_network(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_foreign_file_is_a_sentence(tmp_path: Path) -> None:
    """Neither nothing nor bytes give a traceback."""
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    for name in ("none", "bytes"):
        with pytest.raises(PotentialError, match="no network of ænet in text form"):
            read_network(tmp_path / name)


# -- structures ------------------------------------------------------------------------------------------------------------------------


def test_structures_written_by_hand_are_read_as_they_are_meant(tmp_path: Path) -> None:
    """A cluster and a crystal in the forms of ænet's documentation, a symbol given as number included."""
    cluster, crystal = read_xsf(written(tmp_path, CLUSTER, "a.xsf")), read_xsf(written(tmp_path, CRYSTAL, "b.xsf"))

    assert (cluster.energy, crystal.energy) == (-19543.67017695, -4990.44928342)
    assert cluster.frame.numbers.tolist() == [8, 6, 8]
    assert not cluster.frame.periodic
    assert cluster.forces is not None
    np.testing.assert_array_equal(cluster.forces[1], [0.082, 0.104, 0.206])
    assert crystal.frame.periodic
    assert crystal.frame.numbers.tolist() == [22, 8, 8]
    np.testing.assert_array_equal(crystal.frame.cell[2], [0.1, 0.0, 4.648])
    np.testing.assert_array_equal(crystal.frame.positions[2], [1.483, 3.742, 3.742])
    assert crystal.forces is not None
    np.testing.assert_array_equal(crystal.forces[2], [0.0, 0.004, 0.004])


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_structure_survives_its_file(periodic: bool, labelled: bool, tmp_path: Path) -> None:
    """Energy to the last bit, coordinates and forces to 1e-14; what there is none of stays away."""
    rng = np.random.default_rng(3)
    cell = rng.normal(size=(3, 3)) * 3.0 if periodic else np.zeros((3, 3))
    frame = Frame(np.array([79, 29, 1]), rng.normal(size=(3, 3)) * 5.0, cell, periodic)
    one = Structure(frame, np.float64(-54321.987654321012), rng.normal(size=(3, 3))) if labelled else Structure(frame)
    write_xsf(tmp_path / "x.xsf", one)
    found = read_xsf(tmp_path / "x.xsf")

    assert (found.energy, found.frame.periodic) == (one.energy, periodic)
    np.testing.assert_array_equal(found.frame.numbers, frame.numbers)
    np.testing.assert_allclose(found.frame.positions, frame.positions, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.frame.cell, cell, rtol=0, atol=1e-14)
    assert (found.forces is None) == (one.forces is None)
    if one.forces is not None and found.forces is not None:
        np.testing.assert_allclose(found.forces, one.forces, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello\n", "neither ATOMS nor CRYSTAL"),
        (CLUSTER.replace("C   5", "Q   5"), "'Q' is no element"),
        (CLUSTER.replace(" -0.001  0.001 -0.001", ""), "three coordinates, and in all or in none of them three forces"),
        (CLUSTER.replace("5.133", "five"), "could not convert"),
        (CLUSTER.replace("5.133", "nan"), "not finite"),
        (CRYSTAL.replace("3 1\n", "4 1\n"), "announces 4 atoms and has 3"),
        (CRYSTAL.replace("CRYSTAL", "SLAB"), "neither ATOMS nor CRYSTAL"),
        (CRYSTAL.replace("0.000  4.648  0.000", "2.967  0.000  0.000"), "has no volume"),
        (CRYSTAL[: CRYSTAL.index("3 1")], "ends too early"),
        ("ATOMS\n", "three coordinates"),
    ],
)
def test_a_damaged_structure_is_refused_with_a_sentence(text: str, told: str, tmp_path: Path) -> None:
    """The sentence names the file and what is wrong with it."""
    path = written(tmp_path, text, "x.xsf")
    with pytest.raises(ConfigError, match=told) as caught:
        read_xsf(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_xsf(tmp_path / "none.xsf")


# -- names -----------------------------------------------------------------------------------------------------------------------------


def test_names_find_files_and_members(tmp_path: Path) -> None:
    """A list, a pattern and a folder are the same potential; a folder of folders is a committee in the order of their names."""
    for folder in ("plain", "many/b", "many/a"):
        (tmp_path / folder).mkdir(parents=True)
        for symbol in ("Cu", "Au"):
            written(tmp_path / folder, COPPER, f"{symbol}.5t-5t.nn.ascii")
    plain = tmp_path / "plain"
    pair = (plain / "Au.5t-5t.nn.ascii", plain / "Cu.5t-5t.nn.ascii")

    assert aenet_names.files(str(plain)) == (pair,)
    assert aenet_names.files(f"{plain}/*.nn.ascii") == (pair,)
    assert aenet_names.files(f"{pair[1]}, {pair[0]}") == (pair[::-1],)
    assert [member[0].parent.name for member in aenet_names.files(str(tmp_path / "many"))] == ["a", "b"]
    assert registry.weights_file(f"aenet:{plain}") in pair


@pytest.mark.parametrize("rest", ["", "none", "none/*.nn.ascii", "empty", "both", "Cu.nn.ascii,some.safetensors"])
def test_a_name_without_files_is_a_sentence(rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what may be given."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty/inner", "both/inner"):
        Path(folder).mkdir(parents=True)
    for file in ("both/Cu.nn.ascii", "both/inner/Cu.nn.ascii", "Cu.nn.ascii", "some.safetensors"):
        Path(file).touch()
    with pytest.raises(PotentialError, match=r"no file|the folder has|must stand alone"):
        registry.weights_file(f"aenet:{rest}")


def test_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part by itself; what does not exist stays as it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("Cu.nn.ascii", "Au.nn.ascii"):
        Path(name).touch()
    assert registry.absolute("aenet:Cu.nn.ascii,Au.nn.ascii") == f"aenet:{tmp_path}/Cu.nn.ascii,{tmp_path}/Au.nn.ascii"
    assert registry.absolute("aenet:*.nn.ascii") == f"aenet:{tmp_path}/*.nn.ascii"
    assert registry.absolute("aenet:.") == f"aenet:{tmp_path}"
    assert registry.absolute("aenet:none") == "aenet:none"
