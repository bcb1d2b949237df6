"""Peak memory of a perplexity at length 2,048, in a process of its own: see benchmarks.__main__."""

import json
import resource

from thesislib.evaluate.perplexity import perplexity
from thesislib.formats.load import load_subject
from thesislib.sources.corpus import evaluation_text

MB = 1e6


def peak() -> float:
    """Highest resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


if __name__ == "__main__":
    subject = load_subject()
    model, loaded = sum(p.numel() * p.element_size() for p in subject.model.parameters()) / MB, peak()
    perplexity(subject, evaluation_text(), length=2048, limit=3, batch=1)
    print(
        json.dumps(
            {
                "model_MB": round(model),
                "loaded_MB": round(loaded),
                "peak_MB": round(peak()),
                "above_model_MB": round(peak() - model),
            }
        )
    )
