"""Chapter 4's picture of an idea: recovery counted naively and fairly, as four bars."""

from thesislib.chapters.ch04_recovery import Results, recovered
from thesislib.chapters.drawing import Drawing

ZERO, HEIGHT, WIDE = 150, 88, 70  # of the line that bars stand on, of the bar of what pruning cost, of a bar


def two_countings(results: Results, model: str = "D2", trained: str = "D2+LoRA(wiki)") -> str:
    """What pruning cost a model and what of it is left after training, counted naively and fairly.

    A bar is a loss in nats a token above that of the dense model named under it.
    """
    row = recovered(results).loc[model]
    cost, left = row["cost"], {"naive": row["naive left"], "fair": row["fair left"]}
    picture = Drawing(
        700,
        272,
        f"Four bars. Before training {model} lies {cost:.2f} nats above the dense model. Counted naively, after "
        f"training it lies {left['naive']:+.2f} from the untrained dense model: {row['naive']:.0%} won back. Counted "
        f"fairly, it lies {left['fair']:+.2f} from the dense model with the same training: {row['fair']:.0%} won back.",
    )
    sides = (
        (0, "naive", "Naive: only the pruned model is trained", "dense"),
        (360, "fair", "Fair: the dense model is trained too", "dense+LoRA(wiki)"),
    )
    for x, counting, title, control in sides:
        rest, scale = left[counting], HEIGHT / cost
        picture.text(x + 170, 22, title, bold=True)
        for middle, loss, kind, name, above in (
            (x + 85, cost, "changed", model, "dense"),
            (x + 215, rest, "kept", trained, control),
        ):
            top, bottom = ZERO - max(loss, 0) * scale, ZERO - min(loss, 0) * scale
            picture.box(middle - WIDE / 2, top, WIDE, bottom - top, kind, f"{loss:+.2f}")
            picture.text(middle, top - 8, name)
            picture.text(middle, bottom + 18, f"against {above}", size=12, faint=True)
        picture.arrow(x + 20, ZERO, x + 320, ZERO, dashed=True, head=False)
        picture.arrow(x + 285, ZERO - HEIGHT, x + 285, ZERO - rest * scale)
        picture.text(x + 292, ZERO - HEIGHT + 25, f"{row[counting]:.0%}", at="start", bold=True, size=15)
    picture.text(350, 264, "loss in nats a token; the arrow is what counts as won back", size=12, faint=True)
    return picture.svg()
