"""What lies before the readouts of versions: the network that a process was started with, and those that fine-tunes brought since."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path

from tumbaga.driver.errors import DriverError
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Frame

Opener = Callable[[Path], Potential]
_KIND = ("architecture", "hyper")  # of a potential's metadata: what its weights mean


class Networks:
    """Networks by their fingerprint (see ``tumbaga.online.versions.fingerprint``).

    Args:
        base: the potential that the process was started with; always held.
        opened: loads a version file as a potential by itself; None where only versions of the base network can be served.
    """

    def __init__(self, base: Trainable, opened: Opener | None = None) -> None:
        self._base, self._opened = base, opened
        self._others: dict[str, Trainable] = {}

    @functools.cached_property
    def base(self) -> str:
        """Name of the network that was there first."""
        return versions.fingerprint(self._base.state(), self._base.readout())

    def __getitem__(self, name: str) -> Trainable:
        return self._others.get(name, self._base)

    def __len__(self) -> int:
        return 1 + len(self._others)

    def behind(self, path: Path, layer: versions.LastLayer, warm: Frame | None) -> str:
        """Return the name of the network behind a version file, loading it if it is not held.

        Args:
            path: the file.
            layer: what was read from it.
            warm: a frame to try a new network on before anybody waits for it; None for no trial.

        Raises:
            VersionError: the file is of another potential, or of a run that began with other weights, or its network is not sound.
        """
        self._check_kind(path, layer)
        name = layer.metadata.get(versions.NETWORK, self.base)
        if name == self.base or name in self._others:
            return name
        spec = self._base.spec
        if layer.metadata.get(versions.ORIGIN) != self.base:
            told = f"was learnt behind other weights than those of {spec.name}; begin a new run directory with these"
            raise VersionError(str(path), told)
        self._others[name] = self._loaded(path, name, warm)
        return name

    def keep(self, names: Collection[str]) -> None:
        """Let go of all networks but these and the base."""
        self._others = {name: one for name, one in self._others.items() if name in names}

    def _check_kind(self, path: Path, layer: versions.LastLayer) -> None:
        spec, own = self._base.spec, self._base.metadata
        if layer.readout.shape != (spec.n_columns,):
            raise VersionError(str(path), f"has {layer.readout.size} readout weights; {spec.name} has {spec.n_columns}")
        for key in (key for key in _KIND if key in own and layer.metadata.get(key) != own[key]):
            # other elements, most often: as many weights mean something else there
            told = f"is of another potential: its {key} is {layer.metadata.get(key, 'not told')}, that of {spec.name} {own[key]}"
            raise VersionError(str(path), told)

    def _loaded(self, path: Path, name: str, warm: Frame | None) -> Trainable:
        if self._opened is None:
            raise VersionError(str(path), f"brings a network of its own, which cannot be loaded beside {self._base.spec.name} here")
        try:
            potential = self._opened(path)
        except DriverError as error:
            raise VersionError(str(path), f"cannot be loaded ({error})") from error
        if not isinstance(potential, Trainable) or potential.spec.elements != self._base.spec.elements:
            raise VersionError(str(path), f"is of another potential than {self._base.spec.name}")
        if versions.fingerprint(potential.state(), potential.readout()) != name:
            raise VersionError(str(path), "holds another network than the one that it names")
        if warm is not None and not all(said.finite for said in [potential.predict([warm])[0] for _ in range(2)]):
            raise VersionError(str(path), "gives numbers that are not finite")
        return potential
