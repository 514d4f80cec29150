"""What Python 3.10, the version of JetPack 6, lacks of later ones."""

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
    from typing import Self
else:
    from enum import Enum

    from typing_extensions import Self

    class StrEnum(str, Enum):
        """A text and an enumeration's member at once; `str()` gives the text."""

        __str__ = str.__str__


__all__ = ["Self", "StrEnum"]
