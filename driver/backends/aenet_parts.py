"""Networks of single elements put together to a potential, and taken apart again: between ``aenet_files`` and the tensors of ``aenet_net``.

    E = 1/M sum_m sum_i (W_m[z_i] · f_m,i + b_m[z_i]) / scale_m + shift_m + e_m[z_i]

with M members, the last hidden layers f, and the normalisation of energies undone: the readout of an element is W / (M scale) of all
members, its reference energy the mean of b / scale + shift + e.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from tumbaga.driver.backends.aenet_files import ElementNetwork, Window, spins
from tumbaga.driver.backends.aenet_net import Hyper
from tumbaga.driver.errors import PotentialError

ARCHITECTURE: Final = "aenet-1"
SPINS: Final = "fingerprint.spins"  # the tensor with the weights of the species
Tensors = dict[str, np.ndarray]


def joined(name: str, members: Sequence[Sequence[ElementNetwork]]) -> tuple[Tensors, dict[str, str]]:
    """Return tensors and metadata of a potential.

    Args:
        name: of the potential, for errors.
        members: of the committee; each the networks of all elements, in any order.

    Raises:
        PotentialError: they do not belong together; the sentence says why.
    """
    by_member = [_by_symbol(name, networks) for networks in members]
    if any(set(found) - set(by_member[0]) for found in by_member):
        raise PotentialError(name, "the members of the committee have other elements than the first one")
    symbols = sorted(by_member[0], key=atomic_numbers.__getitem__)
    nets = [[_member(name, found, k, symbol) for symbol in symbols] for k, found in enumerate(by_member, 1)]
    _check(name, symbols, nets)
    hyper = _hyper(symbols, nets)
    tensors: Tensors = {SPINS: np.array([[spins(one.environment)[s] for s in symbols] for one in nets[0]])}
    for e, symbol in enumerate(symbols):
        for layer in range(len(hyper.widths[e])):
            tensors[f"networks.{symbol}.weights.{layer}"] = np.stack([net[e].weights[layer] for net in nets])
            tensors[f"networks.{symbol}.biases.{layer}"] = np.stack([net[e].biases[layer] for net in nets])
    for key, of in (("average", "average"), ("scale", "scales"), ("lowest", "lowest"), ("highest", "highest")):
        tensors[key] = np.stack([[getattr(one, of) for one in net] for net in nets])
    readout = np.zeros((len(symbols), len(nets), hyper.n_each))
    for m, net in enumerate(nets):
        for e, one in enumerate(net):
            readout[e, m, : one.weights[-1].shape[1]] = one.weights[-1][0] / (one.window.scale * len(nets))
    tensors["readout"] = readout.reshape(-1)
    constants = [[one.biases[-1][0] / one.window.scale + one.window.shift + one.atomic_energy for one in net] for net in nets]
    tensors["reference"] = np.mean(constants, axis=0)
    return tensors, {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": json.dumps(_facts(nets[0]))}


def apart(name: str, hyper: Hyper, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> tuple[tuple[ElementNetwork, ...], ...]:
    """Return the networks of single elements of each member, in the order of `hyper.elements`; energies are normalised as the facts say.

    The members share the reference energies of the potential.

    Raises:
        PotentialError: the weights of its species are none that an order of species can give.
    """
    symbols = [chemical_symbols[z] for z in hyper.elements]
    window = Window(**facts.get("window", {}))
    atomic = tuple(float(e) for e in facts.get("atomic", [0.0] * len(symbols)))
    readout = tensors["readout"].reshape(len(symbols), hyper.members, hyper.n_each) * hyper.members * window.scale

    def one(member: int, e: int) -> ElementNetwork:
        symbol, layers = symbols[e], range(len(hyper.widths[e]))
        weights = [_double(tensors[f"networks.{symbol}.weights.{k}"][member]) for k in layers]
        biases = [_double(tensors[f"networks.{symbol}.biases.{k}"][member]) for k in layers]
        average, scale = (_double(tensors[key][member, e]) for key in ("average", "scale"))
        deviation = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        return ElementNetwork(
            element=symbol,
            environment=_environment(name, hyper, e, tensors[SPINS][e].tolist(), facts),
            basis=hyper.basis,
            weights=(*weights, readout[e, member, None, : hyper.n_last(e)]),
            biases=(*biases, np.array([(tensors["reference"][e] - window.shift - atomic[e]) * window.scale])),
            activations=(*hyper.activations[e], 0),
            lowest=_double(tensors["lowest"][member, e]),
            highest=_double(tensors["highest"][member, e]),
            average=average,
            squares=average**2 + deviation**2,
            window=window,
            species=tuple(symbols),
            atomic=atomic,
            description=f"{symbol}, written by tumbaga",
        )

    return tuple(tuple(one(m, e) for e in range(len(symbols))) for m in range(hyper.members))


def _double(values: np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _by_symbol(name: str, networks: Sequence[ElementNetwork]) -> dict[str, ElementNetwork]:
    found = {one.element: one for one in networks}
    if len(found) < len(networks):
        symbols = [one.element for one in networks]
        twice = next(s for s in symbols if symbols.count(s) > 1)
        raise PotentialError(name, f"has two networks for {twice}; put the members of a committee into a folder each")
    return found


def _member(name: str, found: Mapping[str, ElementNetwork], number: int, symbol: str) -> ElementNetwork:
    if symbol not in found:
        raise PotentialError(name, f"member {number} of the committee has no network for {symbol}")
    return found[symbol]


def _check(name: str, symbols: Sequence[str], nets: Sequence[Sequence[ElementNetwork]]) -> None:
    whole = nets[0][0]
    for net in nets:
        for one, like in zip(net, nets[0], strict=True):
            if missing := [s for s in symbols if s not in one.environment]:
                told = f"the network of {one.element} knows the neighbours {', '.join(one.environment)}, not {missing[0]}"
                raise PotentialError(name, told + "; give networks that were trained together")
            if one.basis != whole.basis or (len(one.environment) > 1) != (len(whole.environment) > 1):
                raise PotentialError(
                    name, f"the networks of {one.element} and {whole.element} have other cutoffs or orders; all must have the same"
                )
            shape = [w.shape for w in one.weights], one.activations, one.environment
            if shape != ([w.shape for w in like.weights], like.activations, like.environment):
                raise PotentialError(name, f"the networks of {one.element} have other layers or species in other members of the committee")


def _hyper(symbols: Sequence[str], nets: Sequence[Sequence[ElementNetwork]]) -> Hyper:
    first = nets[0]
    return Hyper(
        elements=tuple(atomic_numbers[s] for s in symbols),
        basis=first[0].basis,
        weighted=len(first[0].environment) > 1,
        widths=tuple(tuple(w.shape[0] for w in one.weights[:-1]) for one in first),
        activations=tuple(one.activations[:-1] for one in first),
        members=len(nets),
    )


def _facts(networks: Sequence[ElementNetwork]) -> dict[str, Any]:
    return {
        "level": "",
        "licence": "",
        "mean_h2": 0.0,
        "window": networks[0].window._asdict(),
        "atomic": [one.atomic_energy for one in networks],
        "environments": [list(one.environment) for one in networks],
    }


def _environment(name: str, hyper: Hyper, species: int, own: Sequence[float], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The order of species that gives these weights of this one's neighbours; species that the potential lacks keep their places."""
    symbols = [chemical_symbols[z] for z in hyper.elements]
    old = [*map(str, facts["environments"][species])] if "environments" in facts else symbols
    ladder = list(spins([str(k) for k in range(len(old))]).values())
    if len(set(own)) < len(own) or not set(own) <= set(ladder):
        told = ", ".join(f"{symbol} {weight:g}" for symbol, weight in zip(symbols, own, strict=True))
        raise PotentialError(name, f"cannot be written for ænet: the weights of its species ({told}) follow from no order of species")
    for symbol, weight in zip(symbols, own, strict=True):
        old[ladder.index(weight)] = symbol
    if len(set(old)) < len(old):
        raise PotentialError(name, f"cannot be written for ænet: its species would be {', '.join(old)}")
    return tuple(old)
