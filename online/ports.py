"""The ports: what a potential, a labeller and a store must offer. Implementations live elsewhere and are handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tumbaga.online.records import Array, Frame, Label, Prediction


@dataclass(frozen=True)
class PotentialSpec:
    """What a back end declares about a potential. Units are no part of it: eV, Å, eV/Å, whatever the back end has inside.

    Attributes:
        name: as the user wrote it, e.g. "painn:cuau-water".
        elements: atomic numbers it knows; empty means any.
        cutoff: interaction range, Å.
        n_hidden: width of the linear readout's input; 0 where there is none (the potential then serves, but cannot learn).
        level: level of theory it was fitted to, for people; empty if unknown.
        mean_h2: mean squared norm of a force row over the training frames, Å^-2: sets the prior of the last-layer update; 0 if unknown.
        dtype: "float32" or "float64", of the arithmetic inside; what it gives is float64 in either case.
        licence: of the weights, as an SPDX identifier ("MIT"); empty if unknown or without weights. That of the code is its package's.
    """

    name: str
    elements: tuple[int, ...]
    cutoff: float
    n_hidden: int = 0
    level: str = ""
    mean_h2: float = 0.0
    dtype: str = "float64"
    licence: str = ""

    @property
    def n_columns(self) -> int:
        """Length of the readout: one block of n_hidden weights an element, in the order of `elements`."""
        return len(self.elements) * self.n_hidden


@dataclass(frozen=True, eq=False)
class ForceRows:
    """The linear model behind one frame: E = phi · w + energy_fixed and F = rows @ w + forces_fixed, for readout weights w.

    Attributes:
        phi: summed features in element blocks, shape (n_columns,), float64.
        rows: -dphi/dR, shape (3 * n_atoms, n_columns), float64, per Å; the row of atom i and direction c is 3 * i + c.
        energy_fixed: the part of the energy outside the readout, eV.
        forces_fixed: the part of the forces outside the readout, shape (n_atoms, 3), float64, eV/Å.
    """

    phi: Array
    rows: Array
    energy_fixed: float
    forces_fixed: Array


@runtime_checkable
class Potential(Protocol):
    """A model that maps frames to energies and forces."""

    @property
    def spec(self) -> PotentialSpec:
        """Its declaration."""

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate several frames, of any sizes, as one batch.

        Args:
            frames: the frames.
            readouts: readout weights for each frame, shape (n_frames, n_columns), float64, eV; None means the potential's own.
                Different frames may be served by different weights (ramps). Ignored where n_hidden is 0.

        Returns:
            One prediction a frame, in order. Never raises for strange geometries: it may return non-finite numbers instead.
        """


@runtime_checkable
class Trainable(Potential, Protocol):
    """A potential whose energy is linear in a readout: it can take last-layer updates."""

    def readout(self) -> Array:
        """Its own readout weights, shape (n_columns,), float64, eV, in element blocks."""

    def force_rows(self, frame: Frame) -> ForceRows:
        """The linear model of one frame; exact to the arithmetic of the back end."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a file of its tensors must say beside them, so that it can be loaded by itself.

        The values of "architecture" and "hyper" say what the weights mean: a version file with others is not served.
        """

    def state(self, readout: Array | None = None) -> Mapping[str, np.ndarray]:
        """All tensors, for a version file (safetensors); with this readout, shape (n_columns,), eV, in place of its own if one is given."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a potential under training says of a batch: torch tensors in the dtype of its module, on its device, differentiable in its parameters.

    Attributes:
        energies: less the reference energies of the elements, eV, shape (n_frames,): so float32 is enough for them.
        forces: eV/Å, shape (n_atoms of all frames, 3); None if they were not asked for.
        virials: -dE/dstrain, eV, shape (n_frames, 3, 3), symmetric; None if they were not asked for.
    """

    energies: Any
    forces: Any | None = None
    virials: Any | None = None


class Tuning(Protocol):
    """A potential opened for training of all its weights. It belongs to whoever asked for it, and no serving potential shares its tensors."""

    @property
    def module(self) -> Any:
        """The torch.nn.Module whose parameters are trained, all but those that ask for no gradient; it may be read and loaded like any other."""

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names of `module`'s parameters by the part of the potential they are, each in one group.

        Parts have the same names in all back ends, as far as they have them: "embedding", "interactions.0", …, "head" (between them and the
        features), "readout". The trainer knows "reference" beside them.
        """

    @property
    def reference(self) -> Array:
        """Reference energies of the elements, in the order of `spec.elements`, shape (n_elements,), float64, eV: outside the module."""

    def prepare(self, frame: Frame) -> Any:
        """Do once for a frame what needs no parameters, such as its neighbour list; what `evaluate` takes."""

    def evaluate(self, prepared: Sequence[Any], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """Evaluate prepared frames as one batch.

        Args:
            prepared: at least one.
            forces: whether forces are wanted.
            virials: whether virials are wanted.
            create_graph: whether forces and virials are to be differentiable in the parameters; False where they are only looked at.
        """

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> Tunable:
        """Return a new potential with the parameters as they are now.

        Args:
            reference: its reference energies, shape (n_elements,), float64, eV.
            facts: JSON-compatible; they take the place of the facts of the same name that its `metadata` hold ("level", "mean_h2", …).
        """


@runtime_checkable
class Tunable(Trainable, Protocol):
    """A potential all of whose weights can be trained; its `state` and `metadata` make a weights file of it."""

    def tuning(self, seed: int | None = None) -> Tuning:
        """Open a copy for training: with its own weights, or, given a seed, with new ones of the same shape and reference energies of zero."""

    def with_elements(self, like: Mapping[int, int]) -> Tunable:
        """Return a potential in which some elements start as others: embedding, readout and reference energy are copied.

        Args:
            like: atomic number of an element, which the potential may know or not, to one that it knows; e.g. {79: 29} for gold from copper.

        Raises:
            Exception: of the back end, with a sentence: there is nothing to start from, or it cannot be done.
        """


class Labeller(Protocol):
    """Computes the reference energy and forces of frames; runs in a process of its own."""

    @property
    def method(self) -> str:
        """Identifies the level of theory."""

    def label(self, frame: Frame) -> Label:
        """Label one frame.

        Raises:
            LabelFailedError: with the reason, whenever the result could not be trusted (no convergence above all).
        """
