"""Chapter 5's pictures of ideas: one row of GPTQ, the sink's value, and EoRA's weighted SVD."""

from thesislib.chapters.drawing import Drawing

SIDE = 46  # of a weight


def gptq_row() -> str:
    """One step of GPTQ on a row of eight weights: round the third, and push its error to the five on the right."""
    d = Drawing(
        640,
        232,
        "A row of eight weights. The first two are rounded. The third is rounded now; its error goes by arrows to the "
        "five weights on its right, which change. In the row below three are rounded and five are moved.",
    )
    left, rounded = 150, 2
    for y, done, words in ((24, rounded, "before"), (176, rounded + 1, "after")):
        d.text(left - 12, y + SIDE / 2 + 5, words, "end", faint=True)
        for i in range(8):
            kind = "kept" if i < done else "changed" if (done > rounded or i == rounded) else "plain"
            mark = "ŵ" if i < done else "w′" if done > rounded else "w"
            d.box(left + i * SIDE, y, SIDE, SIDE, kind, f"{mark}{'₁₂₃₄₅₆₇₈'[i]}")
    middle = left + (rounded + 0.5) * SIDE
    d.arrow(middle, 24 + SIDE, middle, 100)
    right = left + (rounded + 1) * SIDE
    d.box(right - 160, 102, 160, 34, "changed", "error w₃ − ŵ₃")
    for i in range(rounded + 1, 8):
        d.arrow(right, 119, left + (i + 0.5) * SIDE, 173)
    d.text(right + 20, 112, "a share to each, by H⁻¹, H = XᵀX", "start")
    d.text(left + SIDE, 16, "done", faint=True)
    d.text(left + 5.5 * SIDE, 16, "not yet rounded", faint=True)
    d.text(middle, 16, "round", bold=True)
    return d.svg()


def sink() -> str:
    """The first token's value flows into every token."""
    d = Drawing(
        640,
        236,
        "Eight tokens. Thick arrows lead from the value of token 0 to the output of every token, and dashed ones from "
        "each other token to itself. An error in the value of token 0 appears in all eight outputs.",
    )
    left, step, low, high = 118, 64, 170, 36
    for i in range(8):
        x = left + i * step
        d.box(x, high, 52, 34, "changed", f"o{'₀₁₂₃₄₅₆₇'[i]}+ε")
        d.box(x, low, 52, 34, "changed" if i == 0 else "plain", "v₀+ε" if i == 0 else f"v{'₀₁₂₃₄₅₆₇'[i]}")
        if i:
            d.arrow(x + 26, low, x + 26, high + 37, dashed=True)
        d.arrow(left + 26, low, x + 26 - 14 * bool(i), high + 37)
    d.text(left - 12, high + 22, "outputs", "end", faint=True)
    d.text(left - 12, low + 22, "values", "end", faint=True)
    d.text(left + 26, low + 54, "the sink", bold=True)
    d.text(left + 4.5 * step + 20, low + 54, "other tokens: their errors differ and average out", faint=True)
    d.text(left + 4 * step - 6, high - 14, "the same error ε at every position: a bias")
    return d.svg()


def eora() -> str:
    """The compression error, weighted by the inputs, cut at a rank, and weighted back."""
    d = Drawing(
        700,
        190,
        "Boxes in a row: the error Delta times Q root Lambda of the inputs is the error that counts. Its SVD is cut at "
        "rank r, and weighted back by the inverse root it gives B and A.",
    )
    y = 42
    d.box(8, y, 92, 84, "changed", "Δ")
    d.text(54, y - 12, "error W − Ŵ")
    d.text(114, y + 47, "×")
    d.box(128, y, 84, 84, "plain", "Q √Λ")
    d.text(170, y - 12, "inputs")
    d.text(170, y + 104, "XᵀX = Q Λ Qᵀ", faint=True)
    d.text(228, y + 47, "=")
    d.box(244, y, 92, 84, "changed", "Δ Q √Λ")
    d.text(290, y - 12, "error that counts")
    d.arrow(342, y + 42, 378, y + 42)
    d.text(360, y + 34, "SVD", size=12)
    d.box(386, y, 26, 84, "kept", "U")
    d.box(412, y, 22, 84, "gone")
    d.box(442, y, 26, 26, "kept", "Σ")
    d.box(476, y, 84, 26, "kept", "Vᵀ")
    d.box(476, y + 26, 84, 22, "gone")
    d.text(470, y - 12, "the r largest stay")
    d.arrow(566, y + 42, 600, y + 42)
    d.box(608, y, 26, 84, "added", "B")
    d.box(640, y, 52, 26, "added", "A")
    d.text(650, y - 12, "weighted back")
    d.text(510, y + 66, "cut at rank r", faint=True)
    d.text(692, y + 136, "B = U √Σ,  A = √Σ Vᵀ √Λ⁻¹ Qᵀ", "end")
    d.text(8, y + 136, "A large error on an input that never comes costs nothing.", "start", faint=True)
    return d.svg()
