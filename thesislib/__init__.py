"""thesislib: the tested code under a study of small-language-model compression.

Work flows in one direction. A subject (`thesislib.model.subject`) is loaded with a text (`thesislib.sources.corpus`),
compressed (`thesislib.compress`) and measured (`thesislib.evaluate`). Every measurement records how it was obtained
(`thesislib.records.measurement`).
"""

import os
import sys

__version__ = "0.1.0"

# OpenMP threads that spin while they wait lose more than half of the speed when another program takes a core. Threads
# that sleep at once are slow to wake. A short spin avoids most of both losses (`python -m benchmarks.threads`). OpenMP
# reads these variables when torch loads it, so they are set here, before any module imports torch: one for GNU's OpenMP
# (Linux), one for LLVM's (macOS). The user's own settings stay.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
