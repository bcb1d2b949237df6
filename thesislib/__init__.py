"""thesislib: the tested code under a study of small-language-model compression.

One direction: a subject (`thesislib.subject`) meets a text (`thesislib.corpus`), is changed (`thesislib.compress`),
measured (`thesislib.evaluate`), and every measurement says how it was made (`thesislib.records`).
"""

__version__ = "0.1.0"
