"""Peak memory of a perplexity at length 2,048, in a process of its own: see benchmarks.__main__."""

import json

from benchmarks.timing import MB, peak_MB
from thesislib.evaluate.perplexity import perplexity
from thesislib.formats.load import load_subject
from thesislib.sources.corpus import evaluation_text

if __name__ == "__main__":
    subject = load_subject()
    model, loaded = sum(p.numel() * p.element_size() for p in subject.model.parameters()) / MB, peak_MB()
    perplexity(subject, evaluation_text(), length=2048, limit=3, batch=1)
    peaks = {"model_MB": model, "loaded_MB": loaded, "peak_MB": peak_MB(), "above_model_MB": peak_MB() - model}
    print(json.dumps({name: round(size) for name, size in peaks.items()}))
