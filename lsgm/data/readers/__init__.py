"""Pictures in every form in which people have them, behind one interface."""

from lsgm.data.readers.base import Pictures, Source
from lsgm.data.readers.detect import FORMS, open_source

__all__ = ["FORMS", "Pictures", "Source", "open_source"]
