"""The cost of the study's measurements: each beside a bare loop, in one process, as the median of several runs."""

import thesislib  # noqa: F401  first: it sets how threads wait, before torch is imported
