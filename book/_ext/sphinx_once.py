"""A Sphinx extension of one line's worth: no page loads a script twice.

sphinx-thebe registers its scripts when Sphinx has already begun to, so each page gets them twice and the second
declaration of a constant is an error in the reader's console.
"""


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("html-page-context", _once, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _once(app, pagename, templatename, context, doctree) -> None:
    seen: set = set()
    scripts = context.get("script_files", [])
    keys = [(str(s.filename or ""), s.attributes.get("body")) for s in scripts]
    context["script_files"] = [s for s, key in zip(scripts, keys, strict=True) if not (key in seen or seen.add(key))]
