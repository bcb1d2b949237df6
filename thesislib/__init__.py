"""thesislib: the tested code under a study of small-language-model compression.

One direction: a subject (`thesislib.model.subject`) meets a text (`thesislib.sources.corpus`), is changed
(`thesislib.compress`), measured (`thesislib.evaluate`), and every measurement says how it was made
(`thesislib.records.measurement`).
"""

import os
import sys

__version__ = "0.1.0"

# Threads that wait for each other by spinning keep waiting for one that another program has put aside, which takes more
# than half of the speed; threads that sleep at once are slow to wake. A short spin has most of both (`python -m
# benchmarks.threads`). OpenMP reads this when torch loads it, so it is set here, before any module imports torch, for
# GNU's OpenMP (Linux) and for LLVM's (macOS); what the user has set stays.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
