"""What follows "chgnet:" in a name: a model of the package chgnet or a file, and the elements to learn. Imports neither torch nor chgnet.

chgnet:0.3.0    chgnet:0.3.0?elements=Cu,Au,O,H    chgnet:/path/to/checkpoint.pth.tar    chgnet:/path/to/version.safetensors
"""

from __future__ import annotations

from typing import Final

from tumbaga.driver.backends.guest_names import Names

# all that the wheel brings along
PACKAGED: Final = {
    "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
    "0.2.0": "0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
    "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
}

_NAMES: Final = Names("chgnet", "chgnet", "pretrained", PACKAGED)
wanted, weights_file, absolute = _NAMES.wanted, _NAMES.weights_file, _NAMES.absolute
