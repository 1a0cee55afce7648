"""What follows "sevennet:" in a name: a model of the package sevenn or a file, and the elements to learn. Imports neither torch nor sevenn.

sevennet:7net-0    sevennet:7net-0?elements=Cu,Au,O,H    sevennet:/path/to/checkpoint.pth    sevennet:/path/to/version.safetensors
"""

from __future__ import annotations

from typing import Final

from tumbaga.driver.backends.guest_names import Names

# what the wheel brings along; other models of its list would be fetched from the network behind the user's back
PACKAGED: Final = {
    "7net-0": "SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
    "7net-0_22may2024": "SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
    "7net-l3i5": "SevenNet_l3i5/checkpoint_l3i5.pth",
}

_NAMES: Final = Names("sevennet", "sevenn", "pretrained_potentials", PACKAGED)
wanted, weights_file, absolute = _NAMES.wanted, _NAMES.weights_file, _NAMES.absolute
