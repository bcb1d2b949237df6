"""What the study's measurements cost: side by side with a bare loop, in one process, median of several."""

import thesislib  # noqa: F401  first: it says how threads wait, before torch is there
