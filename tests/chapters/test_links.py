"""Figures and settings that prose names; tests/test_browser.py follows the links of the built book."""

from dataclasses import fields

import pytest

from thesislib.chapters.links import linked, setting
from thesislib.compress.stage import STAGES
from thesislib.errors import BadInput

METRIC = '<a href="#thesislib.compress.depth.Depth.metric">'


def test_figures_and_settings_become_links():
    for text, shown in (
        ("as Figure 3.2 shows", 'as <a href="#fig-3-2">Figure 3.2</a> shows'),
        ("figure 0.1, twelve", '<a href="#fig-0-1">figure 0.1</a>, twelve'),
        ("<code>depth.metric</code>", f'<code class="docutils literal notranslate">{METRIC}depth.metric</a></code>'),
        (
            '<code class="x"><span class="pre">depth:</span> <span class="pre">{metric: taylor}</span></code>',
            f'<code class="docutils literal notranslate">depth: {{{METRIC}metric</a>: taylor}}</code>',
        ),
    ):
        assert linked(f"<p>{text}</p>", lambda name: f"#{name}") == f"<p>{shown}</p>"


def test_nothing_else_does():
    for text in (
        '<a href="#fig-1-1">Figure 1.1.</a>',
        "<h2>Figure 1.1</h2>",
        "<svg><text>Figure 1.1</text></svg>",
        '<img alt="Figure 1.1">',
        "<pre>depth: {metric: taylor}</pre>",
        "<code>page.figure</code> <code>depth</code> <code>Figure 1.1</code>",
        "<abbr title='x'>D2</abbr> in 1.1 [a, b]",
    ):
        assert linked(text, lambda name: f"#{name}") == text


def test_numbers_stay_whole():
    text = "x 1.32 [1.31, 1.33], +2.9 points [+1.5, +4.3], 14.3% [12.5%, 16.4%] and 95 % (n = 24)"
    shown = "x~1.32 [1.31,~1.33], +2.9 points [+1.5,~+4.3], 14.3% [12.5%,~16.4%] and 95~% (n = 24)"
    assert linked(text, str) == shown.replace("~", "&nbsp;")


def test_what_does_not_exist_is_an_error():
    with pytest.raises(BadInput, match="unknown setting of depth 'metrik': did you mean 'metric'"):
        linked("<code>depth.metrik</code>", str)
    with pytest.raises(KeyError):
        linked("Figure 9.9", {}.__getitem__)


def test_a_setting_is_described_by_the_class_that_names_it():
    assert setting("depth", "seed") == "thesislib.compress.stage.Calibrated.seed"
    assert setting("gptq", "bits") == "thesislib.compress.gptq.Rtn.bits"
    assert all(setting(word, field.name) for word, stage in STAGES.items() for field in fields(stage))
